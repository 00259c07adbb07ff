//! Recorded sessions of the original, replayed against the engine: it plays one node, then the
//! other, and must mean what the recorded node meant. See `drbdrs_tests::replay`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::ExitCode;

use drbdrs_tests::fixtures;
use drbdrs_tests::replay::{Differences, replay};
use drbdrs_tests::wirecase::{Direction, Session, sessions};
use libtest_mimic::{Arguments, Failed, Trial};

/// Differences that are right: sessions (a part of the title), difference (its beginning), why.
const DIFFERENCES: &[(&str, &str, &str)] = &[
    (
        "",
        "an epoch is cut elsewhere",
        "The engine ends an epoch as soon as a write of it is completed; the original when its \
         sender comes to it. Both may: what matters is that no write that depends on a completed \
         one is in the same epoch. The acknowledgements are given for as many writes.",
    ),
    (
        "negative-answers/",
        "Sizes(",
        "The recorded node has no disk, but had one before: its device has a size.",
    ),
    (
        "integrity-zeroes-md5/c1 as a",
        "zeroes as P_DATA instead of Zeroes",
        "Defect 14.3 of the original: its receiver expects a digest that its sender does not send.",
    ),
    (
        "integrity-zeroes-md5/c1 as b",
        "too many: WriteAck",
        "Defect 14.3: the recorded receiver loses the connection over P_ZEROES, the engine takes it.",
    ),
    (
        "versions/v",
        "zeroes as P_DATA instead of Trim",
        "The recorded peer did not agree to P_TRIM; the engine sends nothing that was not agreed.",
    ),
    (
        "diskless/c1 as a",
        "P_UUIDS: 0 bits instead of 2",
        "Writes while the peer had no disk leave no packet from which they could be inferred.",
    ),
    (
        "diskless/c1 as a",
        "P_COMPRESSED_BITMAP of 4 bytes instead of P_COMPRESSED_BITMAP of 6 bytes",
        "The same: their bits are missing.",
    ),
    (
        "two-primaries/c1",
        "",
        "Which of two concurrent writes came first was decided between the recorder and the nodes; \
         and the original loses acknowledgements of barriers (defect 14.2), which ends the \
         recorded connection.",
    ),
];

/// Sessions that end before the engine has anything to do.
const LINK_ONLY: &[&str] = &["auth-one-side-only/c1 as a", "auth-wrong-secret/"];

fn check(title: &str, found: &Differences) -> Result<usize, Failed> {
    let is_known = |what: &str| {
        DIFFERENCES.iter().any(|(place, known, _)| title.contains(place) && what.starts_with(known))
    };
    let wrong: Vec<String> = found
        .iter()
        .filter(|(what, _)| !is_known(what))
        .map(|(what, times)| format!("{times} x {what}"))
        .collect();
    if wrong.is_empty() { Ok(found.len()) } else { Err(wrong.join("\n").into()) }
}

fn trial(session: &Session, title: &str, me: Direction) -> Result<(), Failed> {
    let found = replay(session, me).map_err(|e| format!("{e:#}"))?;
    check(title, &found)?;
    for (what, times) in found {
        println!("{title}: {times} x {what} (known)");
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let sessions = sessions(&fixtures().join("wire")).unwrap();
    let mut trials = Vec::new();
    let mut replayed = 0;
    let all = sessions.len();
    for session in sessions {
        let session = std::sync::Arc::new(session);
        let mut has_engine = false;
        for (me, name) in [(Direction::A2b, "a"), (Direction::B2a, "b")] {
            let title = format!("{} as {name}", session.name);
            // A script that only asks one question is no node.
            let is_question = session.is_script(me) && title.starts_with("negative-answers");
            if is_question || LINK_ONLY.iter().any(|only| title.starts_with(only)) {
                continue;
            }
            has_engine = true;
            let session = std::sync::Arc::clone(&session);
            trials.push(Trial::test(title.clone(), move || trial(&session, &title, me)));
        }
        replayed += usize::from(has_engine);
    }
    // Not at once: the runner reads the list of tests from here.
    trials.push(Trial::test("all sessions that get past authentication are replayed", move || {
        println!("{replayed} of {all} sessions are replayed; the others end in authentication");
        if replayed + 1 >= all { Ok(()) } else { Err("sessions are missing".into()) }
    }));
    libtest_mimic::run(&arguments, trials).exit_code()
}
