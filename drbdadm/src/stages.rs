//! The six stages of up and adjust. Spec: config-and-drbdadm.md §10, §11.5.

use std::collections::{HashSet, VecDeque};

use bstr::{BString, ByteSlice};

use crate::app::{App, Exit};
use crate::backend::{Stderr, Step};
use crate::{print, registry};

/// Stages in the order in which they are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// new-resource, detach, del-minor; for up also new-minor.
    CreateRes,
    /// resource-options.
    AdjustRes,
    /// new-minor of adjust.
    PrepareDisk,
    /// attach, disk-options, resize.
    AdjustDisk,
    /// disconnect, proxy changes.
    PrepareNet,
    /// connect, net-options.
    AdjustNet,
}

const NAMES: [&str; 6] =
    ["create res", "adjust res", "prepare disk", "adjust disk", "prepare net", "adjust net"];

impl Stage {
    fn index(self) -> usize {
        match self {
            Self::CreateRes => 0,
            Self::AdjustRes => 1,
            Self::PrepareDisk => 2,
            Self::AdjustDisk => 3,
            Self::PrepareNet => 4,
            Self::AdjustNet => 5,
        }
    }
}

/// Something to do for a resource.
#[derive(Clone, Debug)]
pub struct Job {
    name: &'static str,
    resource: BString,
    steps: Vec<Step>,
    no_peer: bool,
}

impl Job {
    /// A job of calls; the first failure ends it.
    pub fn new(name: &'static str, resource: &BString, steps: Vec<Step>) -> Self {
        Self { name, resource: resource.clone(), steps, no_peer: false }
    }

    /// A connect that can only say that the peer is not known.
    pub fn without_peer(resource: &BString) -> Self {
        Self { name: "connect", resource: resource.clone(), steps: Vec::new(), no_peer: true }
    }
}

/// The queue of each stage.
#[derive(Default)]
pub struct Stages {
    queues: [VecDeque<Job>; 6],
}

/// How a job ended: the code, and the name of the step that failed.
struct Ended {
    code: i32,
    step: &'static str,
}

impl Stages {
    /// Queues a job.
    pub fn push(&mut self, stage: Stage, job: Job) {
        if let Some(queue) = self.queues.get_mut(stage.index()) {
            queue.push_back(job);
        }
    }

    /// Runs stage after stage; a failure keeps the later stages from being run (except with
    /// progress). Returns 1 if anything failed.
    ///
    /// # Errors
    /// A backend ran out of time.
    pub fn run(&mut self, app: &App, progress: bool) -> Result<i32, Exit> {
        let mut failed = false;
        let mut skip: HashSet<BString> = HashSet::new();
        let mut shown = Vec::new();
        if progress {
            print::stdout(b"[");
        }
        for (at, name) in NAMES.iter().enumerate() {
            let queue = self.queues.get_mut(at).map(std::mem::take).unwrap_or_default();
            if progress && !queue.is_empty() {
                print::stdout(format!("\n{name:>15}:").as_bytes());
            }
            let creates = at == Stage::CreateRes.index() || at == Stage::PrepareDisk.index();
            let mut previous: Option<BString> = None;
            for job in queue {
                let code = run_job(app, &job, &mut skip, creates, progress, &mut previous)?;
                failed |= code != 0;
            }
            if failed && !progress {
                return Ok(1);
            }
            shown.push(at);
        }
        if progress {
            print::stdout(b"\n]\n");
        }
        Ok(i32::from(failed))
    }
}

fn run_job(
    app: &App,
    job: &Job,
    skip: &mut HashSet<BString>,
    creates: bool,
    progress: bool,
    previous: &mut Option<BString>,
) -> Result<i32, Exit> {
    let resource = &job.resource;
    if skip.contains(resource) {
        if progress {
            print::stdout(format!(" [skipped:{resource}]").as_bytes());
        } else {
            let program = &app.invocation.program;
            let name = job.name;
            print::complain(format!("{program}: {name} {resource}: skipped due to earlier error"));
        }
        return Ok(0);
    }
    if progress && previous.as_ref() != Some(resource) {
        print::stdout(format!(" {resource}").as_bytes());
    }
    *previous = Some(resource.clone());
    if job.no_peer {
        print::complain(format!(
            "resource {resource}: cannot configure network without knowing my peer."
        ));
        return Ok(20);
    }
    let ended = run_steps(app, &job.steps, progress)?;
    if ended.code != 0 {
        if creates {
            skip.insert(resource.clone());
        }
        if progress {
            let (step, code) = (ended.step, ended.code);
            print::stdout(format!(":failed({step}:{code})").as_bytes());
        }
    }
    Ok(ended.code)
}

fn run_steps(app: &App, steps: &[Step], quiet: bool) -> Result<Ended, Exit> {
    for step in steps {
        let mut call = step.call.clone();
        if quiet {
            call.stderr = Stderr::Discard;
        }
        let result = app.backend.run(&call);
        if result.expired {
            return Err(Exit(20));
        }
        if result.code == 0 {
            if let Some(link) = &step.link
                && !app.backend.dry_run
            {
                registry::register(link, app.config_file().as_bstr());
            }
        } else if !step.ignore_code {
            return Ok(Ended { code: result.code, step: step.name });
        }
    }
    Ok(Ended { code: 0, step: "" })
}
