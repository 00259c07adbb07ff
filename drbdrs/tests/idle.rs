//! Many idle resources: memory and processor time.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::time::Duration;

use drbd_core::Engine;
use drbdrs::plane::io::Choice;
use drbdrs::plane::run::{Command, Config, spawn};

/// KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap()
}

#[test]
fn a_hundred_idle_resources_cost_little() {
    for io in [Choice::Auto, Choice::Threads] {
        let before = resident();
        let planes: Vec<_> = (0..100)
            .map(|seed| {
                let config = Config { io, is_pinned: false, seed, ..Config::default() };
                spawn("r", config, move || Engine::new(seed), Box::new(|_| {})).unwrap()
            })
            .collect();
        std::thread::sleep(Duration::from_millis(300));
        let (memory, start) = (resident() - before, cpu_time());
        std::thread::sleep(Duration::from_secs(1));
        let used = cpu_time() - start;
        println!("{io:?}: {memory} KiB, {used:?} of CPU in 1 s");
        assert!(memory < 30_000, "{io:?}: {memory} KiB for 100 resources");
        assert!(used < Duration::from_millis(5), "{io:?}: {used:?} of CPU in 1 s");
        for (handle, thread) in planes {
            assert!(handle.send(Command::Stop).is_ok());
            thread.join().unwrap();
        }
    }
}
