//! Tables of commands and their outcomes.
