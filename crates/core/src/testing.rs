//! Engines for tests.
