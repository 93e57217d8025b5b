//! Durations, sizes, names and order as people read them.
//!
//! Sources: docker/go-units `HumanDuration`, `BytesSize`; docker/cli `formatter.PrettyPrint`,
//! `TruncateID`, `Ellipsis`; fvbommel/sortorder `NaturalLess`; distribution/reference `FamiliarString`.

use std::cmp::Ordering;
use std::time::Duration;

/// `3 seconds`, `About a minute`, `2 weeks`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let minutes = seconds / 60;
    let hours = (seconds + 1800) / 3600;
    match () {
        () if seconds < 1 => "Less than a second".into(),
        () if seconds == 1 => "1 second".into(),
        () if seconds < 60 => format!("{seconds} seconds"),
        () if minutes == 1 => "About a minute".into(),
        () if minutes < 60 => format!("{minutes} minutes"),
        () if hours == 1 => "About an hour".into(),
        () if hours < 48 => format!("{hours} hours"),
        () if hours < 24 * 7 * 2 => format!("{} days", hours / 24),
        () if hours < 24 * 30 * 2 => format!("{} weeks", hours / 24 / 7),
        () if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        () => format!("{} years", seconds / 3600 / 24 / 365),
    }
}

/// A Go duration: `1m30s`, `500ms`, `0s`.
pub(crate) fn go_duration(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    if nanos == 0 {
        return "0s".into();
    }
    if nanos < 1_000_000_000 {
        let (unit, name) = match nanos {
            0..1_000 => (1.0, "ns"),
            1_000..1_000_000 => (1e3, "µs"),
            _ => (1e6, "ms"),
        };
        return format!("{}{name}", nanos as f64 / unit);
    }
    let seconds = duration.as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let rest = (seconds % 60) as f64 + f64::from(duration.subsec_nanos()) / 1e9;
    match (hours, minutes) {
        (0, 0) => format!("{rest}s"),
        (0, minutes) => format!("{minutes}m{rest}s"),
        (hours, minutes) => format!("{hours}h{minutes}m{rest}s"),
    }
}

/// `1.953GiB`: four digits, a power of 1024.
pub(crate) fn bytes_binary(bytes: i64) -> String {
    scaled(bytes as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"], 4)
}

/// `7.34MB`: three digits, a power of 1000, as image sizes are shown.
pub(crate) fn bytes_decimal(bytes: u64) -> String {
    scaled(bytes as f64, 1000.0, &["B", "kB", "MB", "GB", "TB", "PB"], 3)
}

fn scaled(mut amount: f64, base: f64, units: &[&str], digits: usize) -> String {
    let mut unit = 0;
    while amount >= base && unit + 1 < units.len() {
        amount /= base;
        unit += 1;
    }
    let whole_digits = format!("{}", amount.trunc()).len();
    let text = format!("{amount:.*}", digits.saturating_sub(whole_digits));
    let text = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => &text,
    };
    format!("{text}{}", units[unit])
}

/// The first letter in upper case.
pub(crate) fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_uppercase().chain(chars).collect(),
        None => String::new(),
    }
}

/// The first 12 characters of an id; a digest loses its algorithm.
pub(crate) fn short_id(id: &str) -> &str {
    let id = id.split_once(':').map_or(id, |(_, hex)| hex);
    id.get(..12).unwrap_or(id)
}

/// At most `length` characters, the last of them `…` where something was cut.
pub(crate) fn ellipsis(text: &str, length: usize) -> String {
    if text.chars().count() <= length {
        return text.to_owned();
    }
    text.chars().take(length - 1).chain(['…']).collect()
}

/// An image's name without what everybody knows (`docker.io/library/`) and, where it has a tag,
/// without its digest.
pub(crate) fn familiar_image(image: &str) -> String {
    let (name, digest) = image.split_once('@').map_or((image, None), |(n, d)| (n, Some(d)));
    let short = name.strip_prefix("docker.io/").unwrap_or(name);
    let short = short.strip_prefix("library/").unwrap_or(short);
    let has_tag = short.rsplit('/').next().is_some_and(|last| last.contains(':'));
    match digest {
        Some(digest) if !has_tag => format!("{short}@{digest}"),
        _ => short.to_owned(),
    }
}

/// Order in which `web.2` comes before `web.10`.
pub(crate) fn natural_order(a: &str, b: &str) -> Ordering {
    let (mut a_rest, mut b_rest) = (a, b);
    loop {
        let (a_digits, b_digits) = (digits(a_rest), digits(b_rest));
        if a_digits > 0 && b_digits > 0 {
            let number = |text: &str, length: usize| {
                let text = text[..length].trim_start_matches('0');
                (text.len(), text.to_owned())
            };
            let order = number(a_rest, a_digits).cmp(&number(b_rest, b_digits));
            if order != Ordering::Equal {
                return order;
            }
            (a_rest, b_rest) = (&a_rest[a_digits..], &b_rest[b_digits..]);
            continue;
        }
        match (a_rest.chars().next(), b_rest.chars().next()) {
            (Some(x), Some(y)) if x == y => {
                (a_rest, b_rest) = (&a_rest[x.len_utf8()..], &b_rest[y.len_utf8()..]);
            }
            (x, y) => return x.cmp(&y).then_with(|| a.cmp(b)),
        }
    }
}

fn digits(text: &str) -> usize {
    text.bytes().take_while(u8::is_ascii_digit).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (seconds, expect) in [
            (0, "Less than a second"),
            (1, "1 second"),
            (59, "59 seconds"),
            (60, "About a minute"),
            (119, "About a minute"),
            (120, "2 minutes"),
            (3599, "59 minutes"),
            (3600, "About an hour"),
            (5399, "About an hour"),
            (7200, "2 hours"),
            (47 * 3600, "47 hours"),
            (48 * 3600, "2 days"),
            (15 * 86400, "2 weeks"),
            (70 * 86400, "2 months"),
            (800 * 86400, "2 years"),
        ] {
            assert_eq!(duration(Duration::from_secs(seconds)), expect, "{seconds}");
        }
        for (millis, expect) in
            [(0, "0s"), (500, "500ms"), (1500, "1.5s"), (90_000, "1m30s"), (3_600_000, "1h0m0s")]
        {
            assert_eq!(go_duration(Duration::from_millis(millis)), expect);
        }
    }

    #[test]
    fn sizes_and_names() {
        assert_eq!(bytes_binary(2_097_152_000), "1.953GiB");
        assert_eq!(bytes_binary(64 << 20), "64MiB");
        assert_eq!(bytes_decimal(7_340_032), "7.34MB");
        assert_eq!(bytes_decimal(999), "999B");
        assert_eq!(capitalize("running"), "Running");
        assert_eq!(short_id("sha256:0123456789abcdef"), "0123456789ab");
        assert_eq!(short_id("short"), "short");
        assert_eq!(
            ellipsis("no suitable node (insufficient memory)", 30),
            "no suitable node (insufficien…"
        );
        assert_eq!(ellipsis("short", 30), "short");
    }

    #[test]
    fn images() {
        for (image, expect) in [
            ("docker.io/library/whoami:latest@sha256:ab", "whoami:latest"),
            ("docker.io/traefik/whoami:v1", "traefik/whoami:v1"),
            ("registry.lan:5000/app@sha256:ab", "registry.lan:5000/app@sha256:ab"),
            ("whoami", "whoami"),
        ] {
            assert_eq!(familiar_image(image), expect);
        }
    }

    #[test]
    fn numbers_in_names_count_as_numbers() {
        let mut names = ["web.10", "web.2", "api.1", "web.1", "web"];
        names.sort_by(|a, b| natural_order(a, b));
        assert_eq!(names, ["api.1", "web", "web.1", "web.2", "web.10"]);
    }
}
