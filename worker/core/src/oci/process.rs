//! The command line and the environment of a container.

use super::Error;
use super::input::{ContainerInput, ImageConfig};

/// PATH where neither image nor service sets one.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The command line: entrypoint, then command.
///
/// A service that replaces the entrypoint also drops the image's command, and one that replaces it
/// by the empty string runs without entrypoint. Source: moby `daemon/commit.go`, `merge`.
pub fn arguments(image: &ImageConfig, container: &ContainerInput) -> Result<Vec<String>, Error> {
    let of_image = |words: &Option<Vec<String>>| words.clone().unwrap_or_default();
    let (mut words, rest) = if container.command.is_empty() {
        let command =
            if container.args.is_empty() { of_image(&image.cmd) } else { container.args.clone() };
        (of_image(&image.entrypoint), command)
    } else if container.command == [""] {
        (Vec::new(), container.args.clone())
    } else {
        (container.command.clone(), container.args.clone())
    };
    words.extend(rest);
    match words.first() {
        None => Err(Error::NoCommand),
        Some(first) if first.is_empty() => Err(Error::NoCommand),
        Some(_) if words.iter().any(|word| word.contains('\0')) => {
            Err(Error::NulByte("an argument"))
        }
        Some(_) => Ok(words),
    }
}

/// The environment: defaults, the image's variables, the service's.
///
/// `NAME` without `=` in the service removes the variable. Source: moby
/// `container/env.go`, `ReplaceOrAppendEnvVars`, and `Container.CreateDaemonEnvironment`; HOME is
/// runc's, from the user's entry in the image.
pub fn environment(
    image: &ImageConfig,
    container: &ContainerInput,
    hostname: &str,
    home: &str,
) -> Result<Vec<String>, Error> {
    let mut variables = vec![DEFAULT_PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if container.tty {
        variables.push("TERM=xterm".to_owned());
    }
    variables.push(format!("HOME={home}"));
    for variable in image.env.iter().flatten().chain(&container.env) {
        set(&mut variables, variable);
    }
    // The runtime finds the program with PATH, so PATH cannot be absent.
    if !variables.iter().any(|variable| variable.starts_with("PATH=")) {
        variables.push(DEFAULT_PATH.to_owned());
    }
    if variables.iter().any(|variable| variable.contains('\0')) {
        return Err(Error::NulByte("an environment variable"));
    }
    Ok(variables)
}

/// Sets or, where `variable` has no `=`, removes a variable, keeping the place of the first one.
pub fn set(variables: &mut Vec<String>, variable: &str) {
    let name_of = |variable: &str| variable.split('=').next().unwrap_or("").to_owned();
    let name = name_of(variable);
    if !variable.contains('=') {
        variables.retain(|known| name_of(known) != name);
        return;
    }
    match variables.iter_mut().find(|known| name_of(known) == name) {
        Some(known) => variable.clone_into(known),
        None => variables.push(variable.to_owned()),
    }
}

/// The host name: as asked, or the start of the id.
pub fn hostname(id: &str, container: &ContainerInput) -> String {
    match &container.hostname {
        Some(name) if !name.is_empty() => name.clone(),
        _ => id.chars().take(12).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(|word| word.replace("\"\"", "")).collect()
    }

    #[track_caller]
    fn check(entrypoint: &str, cmd: &str, command: &str, args: &str, expect: &str) {
        let image = ImageConfig {
            entrypoint: Some(words(entrypoint)),
            cmd: Some(words(cmd)),
            ..ImageConfig::default()
        };
        let container = ContainerInput {
            command: words(command),
            args: words(args),
            ..ContainerInput::default()
        };
        let got = arguments(&image, &container).map(|words| words.join(" "));
        assert_eq!(got.unwrap_or_else(|error| error.to_string()), expect);
    }

    #[test]
    fn the_service_replaces_entrypoint_and_command_as_in_docker() {
        check("/entry", "serve", "", "", "/entry serve");
        check("/entry", "serve", "", "check", "/entry check");
        check("/entry", "serve", "/other", "", "/other");
        check("/entry", "serve", "/other", "-x", "/other -x");
        check("/entry", "serve", "\"\"", "sh", "sh");
        check("", "sh", "", "", "sh");
        check("/entry", "serve", "\"\"", "", "no command specified");
        check("", "", "", "", "no command specified");
    }

    #[test]
    fn variables_override_in_place_and_can_be_removed() {
        let image = ImageConfig {
            env: Some(vec!["PATH=/bin".into(), "A=1".into(), "B=2".into()]),
            ..ImageConfig::default()
        };
        let container = ContainerInput {
            env: vec!["B=3=4".into(), "A".into(), "C=".into()],
            tty: true,
            ..ContainerInput::default()
        };
        let expect = ["PATH=/bin", "HOSTNAME=h", "TERM=xterm", "HOME=/root", "B=3=4", "C="]
            .map(String::from);
        assert_eq!(environment(&image, &container, "h", "/root"), Ok(expect.to_vec()));
    }

    #[test]
    fn path_survives_an_attempt_to_remove_it() {
        let container = ContainerInput { env: vec!["PATH".into()], ..ContainerInput::default() };
        let got = environment(&ImageConfig::default(), &container, "h", "/").unwrap();
        assert_eq!(got.last().map(String::as_str), Some(DEFAULT_PATH));
    }

    #[test]
    fn a_nul_byte_is_refused_rather_than_cut_off() {
        let container = ContainerInput { args: vec!["a\0b".into()], ..ContainerInput::default() };
        assert!(arguments(&ImageConfig::default(), &container).is_err());
    }
}
