//! `--filter key=value`: values of one key are alternatives, keys must all hold.

use std::collections::BTreeMap;

use skep_common::Kind;

use super::Event;

/// Keys, each with the kind whose objects it names, if it names any.
const KEYS: [(&str, Option<Kind>); 11] = [
    ("config", Some(Kind::Config)),
    ("event", None),
    ("image", Some(Kind::Image)),
    ("network", Some(Kind::Network)),
    ("node", Some(Kind::Node)),
    ("scope", None),
    ("secret", Some(Kind::Secret)),
    ("service", Some(Kind::Service)),
    ("stack", Some(Kind::Stack)),
    ("task", Some(Kind::Task)),
    ("type", None),
];

/// Which events are wanted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filter(BTreeMap<&'static str, Vec<String>>);

impl Filter {
    /// Refuses keys that it does not know, with the words for the user.
    pub fn new(pairs: impl IntoIterator<Item = (String, String)>) -> Result<Self, String> {
        let mut by_key: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
        for (key, value) in pairs {
            let Some((known, _)) = KEYS.iter().find(|(known, _)| *known == key) else {
                let known: Vec<&str> = KEYS.iter().map(|(known, _)| *known).collect();
                return Err(format!("invalid filter '{key}': use one of {}", known.join(", ")));
            };
            by_key.entry(*known).or_default().push(value);
        }
        Ok(Self(by_key))
    }

    /// Whether an event of a kind with that word is wanted.
    pub fn wants(&self, event: &Event, kind: &str) -> bool {
        self.0.iter().all(|(key, values)| values.iter().any(|value| is_it(event, kind, key, value)))
    }
}

fn is_it(event: &Event, kind: &str, key: &str, value: &str) -> bool {
    match key {
        "type" => kind == value,
        "scope" => value == "swarm",
        // As Docker's: `health_status` is any of them.
        "event" => {
            let rest = event.action.strip_prefix(value);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
        }
        _ => {
            let of = KEYS.iter().find(|(known, _)| *known == key).and_then(|(_, kind)| *kind);
            let is_own = of == Some(event.kind)
                && (is_id(&event.id_text(), value) || event.attribute("name") == Some(value));
            is_own || names(event, key, value)
        }
    }
}

/// Whether it happened to something that belongs to the named one.
fn names(event: &Event, key: &str, value: &str) -> bool {
    let id = match key {
        "service" => event.attribute("service.id"),
        "node" => event.attribute("node.id"),
        "stack" | "image" => None,
        _ => return false,
    };
    event.attribute(key) == Some(value) || id.is_some_and(|id| is_id(id, value))
}

/// An id, or the beginning of one.
fn is_id(id: &str, value: &str) -> bool {
    !value.is_empty() && id.starts_with(value)
}
