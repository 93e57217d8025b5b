//! Compose files as service specs.
//!
//! Driven by `skep stack deploy` and `stack config`: [`load`] reads the files, puts the caller's
//! variables in, lays later files over earlier ones and converts each service. It is pure: texts and
//! variables come in, and by a function the files that secrets are made of; specs and sentences go out.
//!
//! # Invariants
//!
//! - Every error of the files is reported at once, each with its file and line, what is wrong and
//!   what to do; with one error there is no spec.
//! - A key of the Compose specification that skep does not act on yet is a warning, never an error
//!   and never silence; `x-…` keys are silence.
//! - The same files and variables give the same specs, byte for byte.
//!
//! # Reading order
//!
//! [`load`], then `tree` (YAML with lines), `interpolate`, `merge`, `fields` (typed reading),
//! `service`, `deploy`, `published`, `network`, `payloads`; [`units`] and [`ports`] are Docker's notations, which the client's
//! flags share.

mod deploy;
mod fields;
mod interpolate;
mod known;
mod merge;
mod network;
mod payloads;
pub mod ports;
mod published;
mod service;
#[cfg(test)]
mod tests;
mod tree;
pub mod units;

use std::collections::BTreeMap;
use std::fmt;

pub use service::{IMAGE_LABEL, STACK_LABEL};

use crate::spec::StackSpec;
use fields::Section;
use network::Networks;
use payloads::{Kind, Payloads};
use tree::{Node, Value};

/// A file that was read.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its name for messages.
    pub name: String,
    /// Its text.
    pub text: String,
}

/// The specs of a stack and what the user should know about them.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The services, networks, secrets and configs, by name.
    pub spec: StackSpec,
    /// One sentence each, with file and line.
    pub warnings: Vec<String>,
}

/// Everything that is wrong with the files: one sentence each, with file and line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Errors(pub Vec<String>);

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

/// A line of one of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
struct Pos {
    file: usize,
    line: usize,
}

/// A sentence about a line.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Problem {
    at: Pos,
    message: String,
}

/// Errors and warnings found so far.
#[derive(Debug, Default)]
struct Report {
    errors: Vec<Problem>,
    warnings: Vec<Problem>,
}

impl Report {
    fn error(&mut self, at: Pos, message: String) {
        self.errors.push(Problem { at, message });
    }

    fn warn(&mut self, at: Pos, message: String) {
        self.warnings.push(Problem { at, message });
    }

    /// Warnings as sentences, or the errors.
    fn finish(self, sources: &[Source]) -> Result<Vec<String>, Errors> {
        let sentences = |mut problems: Vec<Problem>| -> Vec<String> {
            problems.sort();
            problems.dedup();
            let sentence = |Problem { at, message }: Problem| {
                format!("{}:{}: {message}", sources[at.file].name, at.line)
            };
            problems.into_iter().map(sentence).collect()
        };
        if self.errors.is_empty() {
            Ok(sentences(self.warnings))
        } else {
            Err(Errors(sentences(self.errors)))
        }
    }
}

/// Converts the files, of which later ones override earlier ones, to the specs of the stack.
///
/// `environment` gives the values of variables and of environment entries without a value, `read` the
/// bytes of a file that the document names, or why there are none.
pub fn load(
    stack: &str,
    sources: &[Source],
    environment: &BTreeMap<String, String>,
    read: &dyn Fn(&str) -> Result<Vec<u8>, String>,
) -> Result<Loaded, Errors> {
    check_stack_name(stack)?;
    let mut report = Report::default();
    let root = merged(sources, Some(environment), &mut report)?;
    let top = Section::new(String::new(), String::new(), &root, &mut report);
    top.check(known::TOP, known::TOP_LATER, &mut report);
    let mut services = Vec::new();
    let payloads = payloads::Origin { stack, environment, read };
    let secrets = Payloads::read(Kind::Secret, &payloads, top.get("secrets").as_ref(), &mut report);
    let configs = Payloads::read(Kind::Config, &payloads, top.get("configs").as_ref(), &mut report);
    let context = service::Context { stack, environment, secrets: &secrets, configs: &configs };
    let mut networks = Networks::read(stack, top.get("networks").as_ref(), &mut report);
    match top.get("services") {
        Some(field) => {
            for (key, node) in field.entries(&mut report) {
                services.push(service::convert(&context, &mut networks, key, node, &mut report));
            }
        }
        None => report.error(root.at, "there is no service; add a mapping 'services'".into()),
    }
    services.sort_by(|a, b| a.name.cmp(&b.name));
    let warnings = report.finish(sources)?;
    Ok(Loaded {
        spec: StackSpec {
            name: stack.into(),
            services,
            networks: networks.into_specs(),
            secrets: secrets.into_secrets(),
            configs: configs.into_configs(),
            ..StackSpec::default()
        },
        warnings,
    })
}

/// The merged document as YAML, with variables replaced where `environment` is given.
pub fn config(
    sources: &[Source],
    environment: Option<&BTreeMap<String, String>>,
) -> Result<String, Errors> {
    let mut report = Report::default();
    let root = merged(sources, environment, &mut report)?;
    report.finish(sources)?;
    let yaml = serde_saphyr::to_string(&plain(&root))
        .map_err(|error| Errors(vec![format!("failed to write the document: {error}")]))?;
    Ok(yaml)
}

/// All files as one tree; a file that is not YAML at all ends the matter.
fn merged(
    sources: &[Source],
    environment: Option<&BTreeMap<String, String>>,
    report: &mut Report,
) -> Result<Node, Errors> {
    let mut root: Option<Node> = None;
    let mut broken = Report::default();
    for (file, source) in sources.iter().enumerate() {
        let mut node = match tree::parse(file, &source.text) {
            Ok(node) => node,
            Err(problem) => {
                broken.errors.push(problem);
                continue;
            }
        };
        if let Some(environment) = environment {
            interpolate::apply(&mut node, environment, report);
        }
        match &mut root {
            None => root = Some(node),
            Some(base) if base.value == Value::Null => *base = node,
            Some(base) => merge::merge(base, node, report),
        }
    }
    broken.finish(sources)?;
    root.ok_or_else(|| Errors(vec!["no Compose file was given".into()]))
}

fn check_stack_name(stack: &str) -> Result<(), Errors> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let begins_well = stack.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins_well && stack.chars().all(is_word) {
        return Ok(());
    }
    Err(Errors(vec![format!(
        "invalid stack name: {stack:?}; use letters, digits, '.', '_' and '-', beginning with a letter or digit"
    )]))
}

/// The tree as plain JSON, keys sorted.
fn plain(node: &Node) -> serde_json::Value {
    match &node.value {
        Value::Null => serde_json::Value::Null,
        Value::Bool(value) => (*value).into(),
        Value::Int(number) => match i64::try_from(*number) {
            Ok(number) => number.into(),
            Err(_) => number.to_string().into(),
        },
        Value::Float(number) => (*number).into(),
        Value::Text(text) => text.as_str().into(),
        Value::List(items) => items.iter().map(plain).collect(),
        Value::Map(entries) => {
            entries.iter().map(|(key, node)| (key.name.clone(), plain(node))).collect()
        }
    }
}
