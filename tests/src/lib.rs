//! Suites that cross crates: fixtures, oracles, fault tests.
