//! The secrets and configs of a service on the command line. Source: docker/cli `opts/{secret,config}.go`.

use skep_common::spec::{ConfigReference, ContainerSpec, FileTarget, SecretReference};

/// `--secret NAME` or `--secret source=NAME,target=PATH,uid=UID,gid=GID,mode=0400,version=N`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Reference {
    source: String,
    file: FileTarget,
    version: Option<u64>,
}

fn parse(text: &str) -> Result<Reference, String> {
    let mut file = FileTarget::default();
    if !text.contains(['=', ',']) {
        text.clone_into(&mut file.name);
        return match text.is_empty() {
            true => Err("source is required: write NAME or source=NAME".into()),
            false => Ok(Reference { source: text.to_owned(), file, version: None }),
        };
    }
    let (mut source, mut version) = (String::new(), None);
    for field in text.split(',') {
        let (key, value) =
            field.split_once('=').ok_or_else(|| format!("invalid field: {field}"))?;
        match key.trim().to_ascii_lowercase().as_str() {
            "source" | "src" => value.clone_into(&mut source),
            "target" => value.clone_into(&mut file.name),
            "uid" => value.clone_into(&mut file.uid),
            "gid" => value.clone_into(&mut file.gid),
            "mode" => file.mode = parse_mode(value)?,
            "version" => {
                let number = value.parse().ok().filter(|number| *number > 0);
                version = Some(number.ok_or_else(|| format!("invalid version {value:?}"))?);
            }
            other => {
                return Err(format!(
                    "invalid field key {other}: use source, target, uid, gid, mode or version"
                ));
            }
        }
    }
    if source.is_empty() {
        return Err("source is required: write source=NAME".into());
    }
    if file.name.is_empty() {
        file.name.clone_from(&source);
    }
    Ok(Reference { source, file, version })
}

/// As Go reads numbers: `0440` and `0o440` are octal.
fn parse_mode(text: &str) -> Result<u32, String> {
    let octal = text.strip_prefix("0o").or_else(|| text.strip_prefix('0'));
    let mode = match octal {
        Some(digits) if !digits.is_empty() => u32::from_str_radix(digits, 8),
        _ => text.parse(),
    };
    mode.map_err(|_| format!("invalid mode specified: {text:?}: write it as 0440"))
}

/// Reads `--secret`.
pub(super) fn parse_secret(text: &str) -> Result<SecretReference, String> {
    let Reference { source, file, version } = parse(text)?;
    Ok(SecretReference {
        file: Some(file),
        secret_name: source,
        version,
        pinned: version.map(|_| true),
        ..SecretReference::default()
    })
}

/// Reads `--config`.
pub(super) fn parse_config(text: &str) -> Result<ConfigReference, String> {
    let Reference { source, file, version } = parse(text)?;
    Ok(ConfigReference {
        file: Some(file),
        config_name: source,
        version,
        pinned: version.map(|_| true),
        ..ConfigReference::default()
    })
}

/// Secrets and configs to add and, by name, to take away.
#[derive(Debug, Clone, Copy)]
pub(super) struct Changes<'a> {
    pub(super) add_secrets: &'a [SecretReference],
    pub(super) remove_secrets: &'a [String],
    pub(super) add_configs: &'a [ConfigReference],
    pub(super) remove_configs: &'a [String],
}

impl Changes<'_> {
    /// Lays the changes over a container.
    pub(super) fn apply(&self, container: &mut ContainerSpec) {
        change(&mut container.secrets, self.add_secrets, |known| {
            self.remove_secrets.contains(&known.secret_name)
        });
        change(&mut container.configs, self.add_configs, |known| {
            self.remove_configs.contains(&known.config_name)
        });
    }
}

fn change<T: Clone + PartialEq>(
    list: &mut Option<Vec<T>>,
    add: &[T],
    is_removed: impl Fn(&T) -> bool,
) {
    let before = list.clone().unwrap_or_default();
    let mut after: Vec<T> = before.iter().filter(|known| !is_removed(known)).cloned().collect();
    after.extend(add.iter().cloned());
    if after != before {
        *list = (!after.is_empty()).then_some(after);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_read_as_dockers_client_does() {
        let words = |text: &str| {
            let Reference { source, file, version } = parse(text)?;
            let FileTarget { name, uid, gid, mode } = file;
            Ok(format!("{source} {name} {uid} {gid} {mode:o} {version:?}"))
        };
        for (text, expect) in [
            ("key", Ok("key key 0 0 444 None")),
            ("source=key", Ok("key key 0 0 444 None")),
            ("src=key,target=/a/b", Ok("key /a/b 0 0 444 None")),
            ("source=key,target=k,uid=10,gid=20,mode=0400", Ok("key k 10 20 400 None")),
            ("source=key,mode=256,version=3", Ok("key key 0 0 400 Some(3)")),
            ("", Err("source is required: write NAME or source=NAME")),
            ("target=a", Err("source is required: write source=NAME")),
            ("source=a,mode=rw", Err("invalid mode specified: \"rw\": write it as 0440")),
            ("source=a,version=0", Err("invalid version \"0\"")),
            ("source=a,b", Err("invalid field: b")),
            (
                "source=a,colour=b",
                Err("invalid field key colour: use source, target, uid, gid, mode or version"),
            ),
        ] {
            let expect: Result<String, String> = expect.map(Into::into).map_err(Into::into);
            assert_eq!(words(text), expect, "{text}");
        }
    }

    #[test]
    fn what_is_removed_makes_room_for_what_is_added() {
        let secret = |text: &str| parse_secret(text).unwrap();
        let mut container = ContainerSpec::default();
        let changes = Changes {
            add_secrets: &[secret("source=new,target=key")],
            remove_secrets: &["old".to_owned()],
            add_configs: &[],
            remove_configs: &[],
        };
        container.secrets = Some(vec![secret("source=old,target=key"), secret("other")]);
        changes.apply(&mut container);
        let expect = vec![secret("other"), secret("source=new,target=key")];
        assert_eq!(container.secrets, Some(expect));
        assert_eq!(container.configs, None);
        let none = Changes {
            add_secrets: &[],
            remove_secrets: &["other".into(), "new".into()],
            ..changes
        };
        none.apply(&mut container);
        assert_eq!(container.secrets, None);
    }
}
