//! Generator of random configurations.
