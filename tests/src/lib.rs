//! Helpers of the tests that boot virtual machines.
