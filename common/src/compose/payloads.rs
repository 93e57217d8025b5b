//! `secrets` and `configs`: those that the document declares, and those that a service finds as files.
//!
//! All that are declared and not external are the stack's own. The bytes come of a file, of a variable of
//! the caller or, of configs, of the document. Source: docker/cli `cli/compose/{loader,convert}`;
//! compose-spec `08-configs.md`, `09-secrets.md`.

use std::collections::BTreeMap;

use super::fields::{Field, Section};
use super::network::external;
use super::service::{STACK_LABEL, plain_pairs};
use super::tree::{Key, Node, Value};
use super::{Report, known};
use crate::spec::{
    Base64, ConfigReference, ConfigSpec, Driver, FileTarget, SecretReference, SecretSpec,
};

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Secret,
    Config,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::Secret => "secret",
            Self::Config => "config",
        }
    }
}

/// Where bytes come from.
pub(super) struct Origin<'a> {
    pub(super) stack: &'a str,
    pub(super) environment: &'a BTreeMap<String, String>,
    pub(super) read: &'a dyn Fn(&str) -> Result<Vec<u8>, String>,
}

/// The secrets, or the configs, of a document.
#[derive(Debug)]
pub(super) struct Payloads {
    kind: Kind,
    by_key: BTreeMap<String, Declared>,
}

/// What a key stands for.
#[derive(Debug)]
struct Declared {
    /// Its full name.
    name: String,
    /// The spec to make it of; `None` where it exists outside of the stack.
    spec: Option<SecretSpec>,
}

/// A place in a container.
struct Reference {
    name: String,
    file: FileTarget,
}

impl Payloads {
    /// Reads the top-level mapping.
    pub(super) fn read(
        kind: Kind,
        origin: &Origin<'_>,
        field: Option<&Field<'_>>,
        report: &mut Report,
    ) -> Self {
        let entries = field.map(|field| field.entries(report)).unwrap_or_default();
        let mut by_key = BTreeMap::new();
        for (key, node) in entries {
            by_key.insert(key.name.clone(), declared(kind, origin, key, node, report));
        }
        Self { kind, by_key }
    }

    /// What a service refers to; of two with one target the later one counts.
    fn of_service(&self, field: &Field<'_>, report: &mut Report) -> Vec<Reference> {
        let mut by_target: BTreeMap<String, Reference> = BTreeMap::new();
        for item in field.items(report) {
            let Some((key, mut file)) = reference(field, item, report) else { continue };
            let Some(declared) = self.by_key.get(&key) else {
                let word = self.kind.word();
                let advice = format!("declare it under the top-level key '{word}s'");
                report.error(
                    item.at,
                    format!(
                        "{} names the {word} {key}, which the file does not have; {advice}",
                        field.name
                    ),
                );
                continue;
            };
            if file.name.is_empty() {
                file.name = key;
            }
            let reference = Reference { name: declared.name.clone(), file };
            by_target.insert(reference.file.name.clone(), reference);
        }
        by_target.into_values().collect()
    }

    /// The secrets of a service, by target.
    pub(super) fn secrets_of(
        &self,
        field: &Field<'_>,
        report: &mut Report,
    ) -> Vec<SecretReference> {
        let found = self.of_service(field, report).into_iter();
        let secret = |Reference { name, file }| SecretReference {
            file: Some(file),
            secret_name: name,
            ..SecretReference::default()
        };
        found.map(secret).collect()
    }

    /// The configs of a service, by target.
    pub(super) fn configs_of(
        &self,
        field: &Field<'_>,
        report: &mut Report,
    ) -> Vec<ConfigReference> {
        let found = self.of_service(field, report).into_iter();
        let config = |Reference { name, file }| ConfigReference {
            file: Some(file),
            config_name: name,
            ..ConfigReference::default()
        };
        found.map(config).collect()
    }

    /// The stack's own secrets, by name.
    pub(super) fn into_secrets(self) -> Vec<SecretSpec> {
        let mut specs: Vec<_> = self.by_key.into_values().filter_map(|one| one.spec).collect();
        specs.sort_by(|a, b| a.name.cmp(&b.name));
        specs
    }

    /// The stack's own configs, by name.
    pub(super) fn into_configs(self) -> Vec<ConfigSpec> {
        let config = |spec: SecretSpec| ConfigSpec {
            name: spec.name,
            labels: spec.labels,
            data: spec.data,
            templating: spec.templating,
            extra: spec.extra,
        };
        self.into_secrets().into_iter().map(config).collect()
    }
}

fn declared(
    kind: Kind,
    origin: &Origin<'_>,
    key: &Key,
    node: &Node,
    report: &mut Report,
) -> Declared {
    let word = kind.word();
    let (known, later) = match kind {
        Kind::Secret => (known::SECRET, known::SECRET_LATER),
        Kind::Config => (known::CONFIG, &[][..]),
    };
    let section = Section::new(format!("{word} {}", key.name), String::new(), node, report);
    section.check(known, later, report);
    let given = section.get("name").and_then(|field| field.text(report));
    if let Some(name) = external(&section, report) {
        for word in known.iter().filter(|word| !["name", "external"].contains(word)) {
            if let Some(field) = section.get(word) {
                let advice = "an external one is used as it is; remove the key";
                report.error(field.node.at, format!("{}: {advice}", field.name));
            }
        }
        return Declared { name: name.or(given).unwrap_or_else(|| key.name.clone()), spec: None };
    }
    let name = given.unwrap_or_else(|| format!("{}_{}", origin.stack, key.name));
    let mut labels = section.get("labels").map(|field| plain_pairs(&field, report));
    labels.get_or_insert_default().insert(STACK_LABEL.to_owned(), origin.stack.to_owned());
    let driver = |key: &str, report: &mut Report| {
        let name = section.get(key).and_then(|field| field.text(report))?;
        Some(Driver { name, options: None })
    };
    let spec = SecretSpec {
        name: name.clone(),
        labels,
        driver: driver("driver", report),
        templating: driver("template_driver", report),
        data: data(kind, origin, key, &section, report).map(Base64),
        ..SecretSpec::default()
    };
    Declared { name, spec: Some(spec) }
}

/// The bytes, from the one place that is named.
fn data(
    kind: Kind,
    origin: &Origin<'_>,
    key: &Key,
    section: &Section<'_>,
    report: &mut Report,
) -> Option<Vec<u8>> {
    let places: &[&str] = match kind {
        Kind::Secret => &["file", "environment"],
        Kind::Config => &["file", "environment", "content"],
    };
    let given: Vec<Field<'_>> = places.iter().filter_map(|place| section.get(place)).collect();
    let [field] = given.as_slice() else {
        let owner = format!("{} {}", kind.word(), key.name);
        let places = places.join(", ");
        let message = match given.is_empty() {
            true => format!("{owner} has no content; add one of {places}, or 'external: true'"),
            false => format!("{owner} has several contents; keep one of {places}"),
        };
        report.error(key.at, message);
        return None;
    };
    let text = field.text(report)?;
    let found = match field.name.rsplit('\'').nth(1) {
        Some("file") => (origin.read)(&text).map_err(|why| format!("cannot read {text}: {why}")),
        Some("environment") => match origin.environment.get(&text) {
            Some(value) => Ok(value.clone().into_bytes()),
            None => Err(format!("{text} is not set in the environment")),
        },
        _ => Ok(text.into_bytes()),
    };
    let found = found.and_then(|data| match data.is_empty() {
        true => Err("is empty; it must have at least one byte".to_owned()),
        false => Ok(data),
    });
    found.map_err(|why| report.error(field.node.at, format!("{}: {why}", field.name))).ok()
}

/// The key that an item of a service names, and where it is put; without a target the name is empty.
fn reference(field: &Field<'_>, item: &Node, report: &mut Report) -> Option<(String, FileTarget)> {
    let mut file = FileTarget::default();
    if let Value::Text(key) = &item.value {
        return Some((key.clone(), file));
    }
    let section = field.item(item).section(report);
    section.check(known::REFERENCE, &[], report);
    let scalar = |key: &str, report: &mut Report| {
        let field = section.get(key)?;
        match field.node.value {
            Value::Int(number) => Some(number.to_string()),
            _ => field.text(report),
        }
    };
    if let Some(target) = section.get("target").and_then(|field| field.text(report)) {
        file.name = target;
    }
    if let Some(uid) = scalar("uid", report) {
        file.uid = uid;
    }
    if let Some(gid) = scalar("gid", report) {
        file.gid = gid;
    }
    if let Some(field) = section.get("mode") {
        match &field.node.value {
            Value::Int(_) => file.mode = field.number(report)?,
            // In quotes it is octal with or without the zero, as compose-spec says.
            Value::Text(text) => match u32::from_str_radix(text, 8) {
                Ok(mode) => file.mode = mode,
                Err(_) => field.refuse("a mode in octal, for example 0440", report),
            },
            _ => field.refuse("a mode in octal, for example 0440", report),
        }
    }
    match section.get("source") {
        Some(source) => Some((source.text(report)?, file)),
        None => {
            report.error(item.at, format!("{} has an item without 'source'; add it", field.name));
            None
        }
    }
}
