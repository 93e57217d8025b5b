//! Runs the agent against an executor that runs nothing.
