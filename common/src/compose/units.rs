//! Docker's ways to write durations, sizes, processors and command lines.
//!
//! Sources: Go `time.ParseDuration`, docker/go-units `RAMInBytes`, docker/cli `opts.ParseCPUs`,
//! mattn/go-shellwords.

use std::collections::BTreeSet;

use crate::spec::Nanos;

/// Why a text is no duration, size, number of processors or command line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {expected}")]
pub struct ParseError {
    /// What was given.
    pub text: String,
    /// What is expected, with an example.
    pub expected: &'static str,
}

/// Reads `1m30s`, `500ms`, `1.5h` or `0`.
pub fn parse_duration(text: &str) -> Result<Nanos, ParseError> {
    let fail =
        || ParseError { text: text.into(), expected: "a duration such as 30s, 1m30s or 500ms" };
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Ok(Nanos(0));
    }
    let mut total = 0f64;
    if rest.is_empty() {
        return Err(fail());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(fail)?;
        let amount: f64 = rest[..digits].parse().map_err(|_| fail())?;
        rest = &rest[digits..];
        let length = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let nanos = match &rest[..length] {
            "ns" => 1.0,
            "us" | "µs" | "μs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return Err(fail()),
        };
        total += amount * nanos;
        rest = &rest[length..];
    }
    if total >= 9.2e18 {
        return Err(fail());
    }
    Ok(Nanos(total.round() as i64))
}

/// Reads `64M`, `1.5g`, `512KiB` or a number of bytes; a unit is a power of 1024.
pub fn parse_bytes(text: &str) -> Result<i64, ParseError> {
    let fail = || ParseError { text: text.into(), expected: "a size such as 64M, 1.5G or 65536" };
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let amount: f64 = text[..split].parse().map_err(|_| fail())?;
    let unit = text[split..].trim_start().to_ascii_lowercase();
    let power =
        match unit.strip_suffix('b').map_or(unit.as_str(), |u| u.strip_suffix('i').unwrap_or(u)) {
            "" => 0,
            "k" => 1,
            "m" => 2,
            "g" => 3,
            "t" => 4,
            "p" => 5,
            _ => return Err(fail()),
        };
    let bytes = amount * 1024f64.powi(power);
    if bytes >= 9.2e18 {
        return Err(fail());
    }
    Ok(bytes as i64)
}

/// Reads `0.5` or `2` into nano-CPUs, without rounding.
pub fn parse_cpus(text: &str) -> Result<i64, ParseError> {
    let fail = || ParseError {
        text: text.into(),
        expected: "a number of processors such as 0.5 or 2, with at most nine decimals",
    };
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let fraction = fraction.trim_end_matches('0');
    if (whole.is_empty() && fraction.is_empty())
        || !is_number(whole)
        || !is_number(fraction)
        || fraction.len() > 9
    {
        return Err(fail());
    }
    let whole: i64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| fail())? };
    let nanos: i64 = format!("{fraction:0<9}").parse().map_err(|_| fail())?;
    whole.checked_mul(1_000_000_000).and_then(|value| value.checked_add(nanos)).ok_or_else(fail)
}

/// Splits a command line into words as a shell does, without expanding anything.
pub fn split_words(text: &str) -> Result<Vec<String>, ParseError> {
    let fail = || ParseError {
        text: text.into(),
        expected: "a command line with every quote closed and no trailing backslash",
    };
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some('\''), '\'') | (Some('"'), '"') => quote = None,
            (Some('\''), _) => word.get_or_insert_default().push(c),
            (_, '\\') => {
                let next = chars.next().ok_or_else(fail)?;
                let word = word.get_or_insert_default();
                if quote.is_some() && !matches!(next, '"' | '\\' | '$' | '`') {
                    word.push('\\');
                }
                word.push(next);
            }
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err(fail());
    }
    words.extend(word);
    Ok(words)
}

/// Docker's form of a capability's name: `net_admin` is `CAP_NET_ADMIN`, `all` is `ALL`.
pub fn capability(name: &str) -> String {
    let name = name.trim().to_ascii_uppercase();
    if name == "ALL" || name.starts_with("CAP_") { name } else { format!("CAP_{name}") }
}

/// Sorted, distinct capabilities to add and to drop: `ALL` outranks any other, adding outranks
/// dropping. Source: docker/cli `opts.EffectiveCapAddCapDrop`.
pub fn capabilities(add: &[String], drop: &[String]) -> (Vec<String>, Vec<String>) {
    let effective = |names: &[String]| -> BTreeSet<String> {
        let names: BTreeSet<String> = names.iter().map(|name| capability(name)).collect();
        if names.contains("ALL") { ["ALL".to_owned()].into() } else { names }
    };
    let (add, drop) = (effective(add), effective(drop));
    let drop = drop.difference(&add).cloned().collect();
    (add.into_iter().collect(), drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, nanos) in [
            ("1m30s", Some(90_000_000_000)),
            ("500ms", Some(500_000_000)),
            ("1.5h", Some(5_400_000_000_000)),
            ("10us", Some(10_000)),
            ("0", Some(0)),
            ("10", None),
            ("", None),
            ("s", None),
            ("1d", None),
            ("-1s", None),
            ("1..5s", None),
        ] {
            assert_eq!(parse_duration(text).ok().map(|value| value.0), nanos, "{text}");
        }
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("64M", Some(64 << 20)),
            ("64mb", Some(64 << 20)),
            ("64MiB", Some(64 << 20)),
            ("1.5g", Some(3 << 29)),
            ("1 g", Some(1 << 30)),
            ("65536", Some(65536)),
            ("12b", Some(12)),
            ("M", None),
            ("64X", None),
            ("-1", None),
            ("", None),
        ] {
            assert_eq!(parse_bytes(text).ok(), bytes, "{text}");
        }
    }

    #[test]
    fn processors() {
        for (text, nanos) in [
            ("0.5", Some(500_000_000)),
            ("2", Some(2_000_000_000)),
            (".25", Some(250_000_000)),
            ("1.0000000000", Some(1_000_000_000)),
            ("0.0000000001", None),
            ("two", None),
            ("-1", None),
            ("", None),
            (".", None),
        ] {
            assert_eq!(parse_cpus(text).ok(), nanos, "{text}");
        }
    }

    #[test]
    fn command_lines() {
        for (text, words) in [
            ("sleep 10", Some(vec!["sleep", "10"])),
            ("sh -c 'echo \"a b\"'", Some(vec!["sh", "-c", "echo \"a b\""])),
            ("a \"b \\\" c\" d\\ e", Some(vec!["a", "b \" c", "d e"])),
            ("a '' b", Some(vec!["a", "", "b"])),
            ("  ", Some(vec![])),
            ("a 'b", None),
            ("a \\", None),
        ] {
            let got = split_words(text).ok();
            let expect =
                words.map(|words| words.into_iter().map(str::to_owned).collect::<Vec<_>>());
            assert_eq!(got, expect, "{text}");
        }
    }

    #[test]
    fn effective_capabilities() {
        for (add, drop, expect) in [
            ("net_admin CAP_SYS_TIME", "", "+CAP_NET_ADMIN +CAP_SYS_TIME"),
            ("all chown", "", "+ALL"),
            ("chown", "ALL", "+CAP_CHOWN -ALL"),
            ("chown chown", "CHOWN kill", "+CAP_CHOWN -CAP_KILL"),
        ] {
            let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
            let (add, drop) = capabilities(&words(add), &words(drop));
            let mut out: Vec<String> = add.iter().map(|name| format!("+{name}")).collect();
            out.extend(drop.iter().map(|name| format!("-{name}")));
            assert_eq!(out.join(" "), expect);
        }
    }
}
