//! Applies `--change` instructions to an image's configuration, as `docker import` does.
//!
//! Each change is one Dockerfile instruction that needs no build: CMD, ENTRYPOINT, ENV, EXPOSE,
//! HEALTHCHECK, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME or WORKDIR.
//!
//! Source: moby `builder/dockerfile/builder.go` (`validCommitCommands`, `BuildFromConfig`) and
//! `dispatchers.go`; buildkit `frontend/dockerfile/instructions/parse.go`.

use super::config::{Empty, HealthcheckFile, RunConfig};
use super::words;

/// Docker's default shell, which runs a command that is not written as a JSON list.
const SHELL: [&str; 2] = ["/bin/sh", "-c"];
const NANOS_PER_MILLI: u64 = 1_000_000;

/// Why a change was refused. The image is then not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message names every field")]
pub enum Error {
    /// An instruction that needs a build, or none at all.
    #[error(
        "\"{0}\" is not a valid change: use CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, \
         ONBUILD, STOPSIGNAL, USER, VOLUME or WORKDIR"
    )]
    Instruction(String),
    /// The arguments do not fit the instruction.
    #[error("change \"{change}\" is not valid: {reason}")]
    Arguments { change: String, reason: String },
}

/// Applies one change, such as `ENV A=1` or `CMD ["/whoami"]`.
pub fn apply(run: &mut RunConfig, change: &str) -> Result<(), Error> {
    let change = change.trim();
    let (instruction, rest) = change.split_once(char::is_whitespace).unwrap_or((change, ""));
    let rest = rest.trim();
    let result = match instruction.to_ascii_uppercase().as_str() {
        "CMD" => command(rest).map(|words| run.cmd = words),
        "ENTRYPOINT" => command(rest).map(|words| run.entrypoint = words),
        "ENV" => pairs(rest, &run.env).map(|pairs| set_env(&mut run.env, pairs)),
        "LABEL" => pairs(rest, &run.env).map(|pairs| run.labels.extend(pairs)),
        "EXPOSE" => expose(run, rest),
        "HEALTHCHECK" => healthcheck(rest).map(|check| run.healthcheck = Some(check)),
        "ONBUILD" => non_empty(rest).map(|text| run.on_build.push(text.to_owned())),
        "STOPSIGNAL" => one(rest, &run.env).map(|signal| run.stop_signal = Some(signal)),
        "USER" => one(rest, &run.env).map(|user| run.user = user),
        "VOLUME" => volumes(run, rest),
        "WORKDIR" => one(rest, &run.env).map(|dir| run.working_dir = join(&run.working_dir, &dir)),
        _ => return Err(Error::Instruction(change.to_owned())),
    };
    result.map_err(|reason| Error::Arguments { change: change.to_owned(), reason })
}

fn non_empty(rest: &str) -> Result<&str, String> {
    if rest.is_empty() { Err("it needs an argument".to_owned()) } else { Ok(rest) }
}

/// The words of a JSON list, which a shell does not see; `None` for any other text.
fn json_list(rest: &str) -> Option<Vec<String>> {
    rest.starts_with('[').then(|| serde_json::from_str(rest).ok()).flatten()
}

/// A JSON list runs as it is, any other text runs in the shell.
fn command(rest: &str) -> Result<Vec<String>, String> {
    let shell = || SHELL.iter().map(|word| (*word).to_owned()).chain([rest.to_owned()]).collect();
    match json_list(rest) {
        Some(words) => Ok(words),
        None => non_empty(rest).map(|_| shell()),
    }
}

fn expanded(word: &str, env: &[String]) -> Result<String, String> {
    words::expand(word, env).map_err(|error| error.to_string())
}

fn one(rest: &str, env: &[String]) -> Result<String, String> {
    expanded(non_empty(rest)?, env)
}

/// `NAME=value …`, or the old form `NAME value with blanks`.
fn pairs(rest: &str, env: &[String]) -> Result<Vec<(String, String)>, String> {
    let words = words::split(non_empty(rest)?);
    if !words[0].contains('=') {
        let Some((name, value)) = rest.split_once(char::is_whitespace) else {
            return Err("it must have two arguments, or the form NAME=value".to_owned());
        };
        return Ok(vec![(expanded(name, env)?, expanded(value.trim(), env)?)]);
    }
    let mut pairs = Vec::with_capacity(words.len());
    for word in &words {
        let Some((name, value)) = word.split_once('=') else {
            return Err(format!("\"{word}\" is not of the form NAME=value"));
        };
        let name = expanded(name, env)?;
        if name.is_empty() {
            return Err("a name cannot be blank".to_owned());
        }
        pairs.push((name, expanded(value, env)?));
    }
    Ok(pairs)
}

/// Replaces a variable in its place, or adds it at the end.
fn set_env(env: &mut Vec<String>, pairs: Vec<(String, String)>) {
    for (name, value) in pairs {
        let pair = format!("{name}={value}");
        let is_same = |old: &&mut String| old.split('=').next() == Some(name.as_str());
        match env.iter_mut().find(is_same) {
            Some(old) => *old = pair,
            None => env.push(pair),
        }
    }
}

/// `80`, `80/udp` and `7000-7005/tcp`.
fn expose(run: &mut RunConfig, rest: &str) -> Result<(), String> {
    let mut ports = Vec::new();
    for word in words::split(non_empty(rest)?) {
        let word = expanded(&word, &run.env)?;
        let (range, protocol) = word.split_once('/').unwrap_or((&word, "tcp"));
        let protocol = protocol.to_ascii_lowercase();
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (Ok(first), Ok(last)) = (first.parse::<u16>(), last.parse::<u16>()) else {
            return Err(format!("\"{word}\" is no port or range of ports"));
        };
        if !matches!(protocol.as_str(), "tcp" | "udp" | "sctp") || first == 0 || last < first {
            return Err(format!("\"{word}\" is no port or range of ports"));
        }
        ports.extend((first..=last).map(|port| format!("{port}/{protocol}")));
    }
    run.exposed_ports.extend(ports.into_iter().map(|port| (port, Empty {})));
    Ok(())
}

fn volumes(run: &mut RunConfig, rest: &str) -> Result<(), String> {
    let paths = match json_list(rest) {
        Some(paths) => paths,
        None => words::split(non_empty(rest)?),
    };
    let paths: Vec<String> =
        paths.iter().map(|path| expanded(path, &run.env)).collect::<Result<_, _>>()?;
    if paths.iter().any(String::is_empty) {
        return Err("a volume cannot have an empty path".to_owned());
    }
    run.volumes.extend(paths.into_iter().map(|path| (path, Empty {})));
    Ok(())
}

/// Joins a relative directory to the one before it and takes `.` and `..` out (`path.Clean`).
fn join(current: &str, dir: &str) -> String {
    let whole = if dir.starts_with('/') { dir.to_owned() } else { format!("{current}/{dir}") };
    let mut parts: Vec<&str> = Vec::new();
    for part in whole.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// `NONE`, or `[--interval=… …] CMD command`.
fn healthcheck(rest: &str) -> Result<HealthcheckFile, String> {
    let mut check = HealthcheckFile::default();
    let mut rest = non_empty(rest)?;
    while let Some(flag) = rest.strip_prefix("--") {
        let (flag, tail) = flag.split_once(char::is_whitespace).unwrap_or((flag, ""));
        let (name, value) = flag.split_once('=').unwrap_or((flag, ""));
        match name {
            "interval" => check.interval = duration(value)?,
            "timeout" => check.timeout = duration(value)?,
            "start-period" => check.start_period = duration(value)?,
            "start-interval" => check.start_interval = duration(value)?,
            "retries" => {
                check.retries =
                    value.parse().map_err(|_| format!("--retries={value} is no count"))?;
            }
            _ => return Err(format!("unknown flag --{name}")),
        }
        rest = tail.trim_start();
    }
    let (kind, command) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    check.test = match kind.to_ascii_uppercase().as_str() {
        "NONE" if command.is_empty() => vec!["NONE".to_owned()],
        "CMD" => {
            let command = non_empty(command.trim())?;
            match json_list(command) {
                Some(words) => std::iter::once("CMD".to_owned()).chain(words).collect(),
                None => vec!["CMD-SHELL".to_owned(), command.to_owned()],
            }
        }
        _ => return Err("the check must be NONE or CMD with a command".to_owned()),
    };
    Ok(check)
}

/// A duration as Go writes it (`1m30s`, `500ms`, `1.5s`), in nanoseconds. 0 is the default.
fn duration(text: &str) -> Result<u64, String> {
    let refused = || format!("\"{text}\" is no duration such as 30s or 1m30s");
    let mut nanos = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let unit = rest[number..]
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .map_or(rest.len(), |length| number + length);
        let scale = match &rest[number..unit] {
            "ns" => 1.0,
            "us" | "µs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            "" if text == "0" => 0.0,
            _ => return Err(refused()),
        };
        nanos += rest[..number].parse::<f64>().map_err(|_| refused())? * scale;
        rest = &rest[unit..];
    }
    // Half of u64's range is 292 years: beyond it the cast would no longer be exact.
    if text.is_empty() || !(0.0..=9.2e18).contains(&nanos) {
        return Err(refused());
    }
    let nanos = nanos.round() as u64;
    if nanos != 0 && nanos < NANOS_PER_MILLI {
        return Err(format!("duration \"{text}\" cannot be less than 1ms"));
    }
    Ok(nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(changes: &[&str], expect: &str) {
        let mut run = RunConfig::default();
        for change in changes {
            apply(&mut run, change).unwrap_or_else(|error| panic!("{change}: {error}"));
        }
        assert_eq!(serde_json::to_string(&run).unwrap(), expect, "{changes:?}");
    }

    #[test]
    fn changes_edit_the_configuration_as_docker_import_does() {
        check(&[r#"CMD ["/whoami", "-v"]"#], r#"{"Cmd":["/whoami","-v"]}"#);
        check(&["cmd echo $HOME"], r#"{"Cmd":["/bin/sh","-c","echo $HOME"]}"#);
        check(&["ENTRYPOINT []"], "{}");
        check(&["CMD [not json"], r#"{"Cmd":["/bin/sh","-c","[not json"]}"#);
        check(
            &["ENV A=1 B=\"x y\"", "ENV A=2", "ENV C a  b"],
            r#"{"Env":["A=2","B=x y","C=a  b"]}"#,
        );
        check(
            &["ENV P=/bin", "ENV P=$P:/x", "WORKDIR $P"],
            r#"{"Env":["P=/bin:/x"],"WorkingDir":"/bin:/x"}"#,
        );
        check(&["WORKDIR /a/b", "WORKDIR ../c/./d/"], r#"{"WorkingDir":"/a/c/d"}"#);
        check(&["USER 1000:1000"], r#"{"User":"1000:1000"}"#);
        check(
            &["EXPOSE 80 53/UDP 7000-7001"],
            r#"{"ExposedPorts":{"53/udp":{},"7000/tcp":{},"7001/tcp":{},"80/tcp":{}}}"#,
        );
        check(&["LABEL a=1 \"b c\"='d'"], r#"{"Labels":{"a":"1","b c":"d"}}"#);
        check(&["STOPSIGNAL SIGQUIT"], r#"{"StopSignal":"SIGQUIT"}"#);
        check(&["VOLUME [\"/a\"]", "VOLUME /b /c"], r#"{"Volumes":{"/a":{},"/b":{},"/c":{}}}"#);
        check(&["ONBUILD RUN x"], r#"{"OnBuild":["RUN x"]}"#);
        check(&["HEALTHCHECK NONE"], r#"{"Healthcheck":{"Test":["NONE"]}}"#);
        check(
            &[r#"HEALTHCHECK --interval=1.5s --timeout=1m1s --retries=2 CMD ["/x", "y"]"#],
            r#"{"Healthcheck":{"Test":["CMD","/x","y"],"Interval":1500000000,"Timeout":61000000000,"Retries":2}}"#,
        );
        check(&["HEALTHCHECK CMD curl x"], r#"{"Healthcheck":{"Test":["CMD-SHELL","curl x"]}}"#);
    }

    #[test]
    fn what_is_no_change_says_why() {
        for (change, reason) in [
            ("RUN make", "is not a valid change: use CMD"),
            ("", "is not a valid change: use CMD"),
            ("CMD", "it needs an argument"),
            ("ENV A", "it must have two arguments"),
            ("ENV A=1 B", "\"B\" is not of the form NAME=value"),
            ("ENV =1", "a name cannot be blank"),
            ("ENV A=\"x", "quote \" is not closed"),
            ("EXPOSE x", "\"x\" is no port"),
            ("EXPOSE 0", "\"0\" is no port"),
            ("EXPOSE 9-8", "\"9-8\" is no port"),
            ("EXPOSE 80/icmp", "\"80/icmp\" is no port"),
            ("HEALTHCHECK", "it needs an argument"),
            ("HEALTHCHECK CMD", "it needs an argument"),
            ("HEALTHCHECK --interval=5 CMD x", "\"5\" is no duration"),
            ("HEALTHCHECK --interval=1us CMD x", "cannot be less than 1ms"),
            ("HEALTHCHECK --often CMD x", "unknown flag --often"),
            ("HEALTHCHECK curl", "must be NONE or CMD"),
        ] {
            let error = apply(&mut RunConfig::default(), change).unwrap_err().to_string();
            assert!(error.contains(reason), "{change}: {error}");
        }
    }
}
