//! Names of signals, as `--stop-signal` and an image's `StopSignal` write them.

use super::Error;

/// Names of the standard signals by number on x86 and ARM, from 1.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// Second names of the same signals.
const ALIASES: [(&str, i32); 4] = [("IOT", 6), ("CLD", 17), ("POLL", 29), ("UNUSED", 31)];

/// First and last real-time signal that programs may use; glibc keeps 32 and 33.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// SIGTERM, where nothing else is asked.
pub const DEFAULT_STOP: i32 = 15;

/// Reads `SIGTERM`, `term`, `15` or `SIGRTMIN+3`; empty is SIGTERM.
///
/// Source: moby `sys/signal`, `ParseSignal`.
pub fn parse(text: &str) -> Result<i32, Error> {
    let unknown = || Error::UnknownSignal(text.to_owned());
    if text.is_empty() {
        return Ok(DEFAULT_STOP);
    }
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=RTMAX).contains(&number) { Ok(number) } else { Err(unknown()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let real_time = if let Some(rest) = name.strip_prefix("RTMIN") {
        Some((RTMIN, rest))
    } else {
        name.strip_prefix("RTMAX").map(|rest| (RTMAX, rest))
    };
    if let Some((base, offset)) = real_time {
        let offset = if offset.is_empty() { Ok(0) } else { offset.parse::<i32>() };
        let number = offset.ok().and_then(|offset| base.checked_add(offset));
        return number.filter(|number| (RTMIN..=RTMAX).contains(number)).ok_or_else(unknown);
    }
    let alias = ALIASES.iter().find(|(alias, _)| *alias == name).map(|(_, number)| *number);
    let standard = (1..).zip(NAMES).find(|(_, known)| *known == name).map(|(number, _)| number);
    standard.or(alias).ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_read_by_name_and_number() {
        for (text, expect) in [
            ("", Some(15)),
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("9", Some(9)),
            ("SIGKILL", Some(9)),
            ("SIGUSR1", Some(10)),
            ("SIGWINCH", Some(28)),
            ("SIGSYS", Some(31)),
            ("SIGPOLL", Some(29)),
            ("SIGRTMIN", Some(34)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-1", Some(63)),
            ("SIGRTMIN-1", None),
            ("SIGRTMAX+1", None),
            ("0", None),
            ("65", None),
            ("-1", None),
            ("SIGNONE", None),
        ] {
            assert_eq!(parse(text).ok(), expect, "{text:?}");
        }
    }
}
