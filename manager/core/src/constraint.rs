//! Placement constraints: `node.labels.disk == ssd`.
//!
//! The grammar is SwarmKit's (`manager/constraint/constraint.go`), exactly: a key, `==` or `!=`, a
//! value; values are compared whole and without regard to case; a missing label reads as empty, so
//! that `!=` matches it; no node matches an unknown key. All constraints of a spec must hold.
//!
//! Differs: a spec with an unknown key is refused ([`check_keys`]).

use std::net::IpAddr;

use ipnet::IpNet;
use skep_common::Node;

/// What a constraint can be about, for people.
const KEYS: &str = "node.id, node.hostname, node.ip, node.role, node.platform.os, node.platform.arch, \
                    node.labels.KEY or engine.labels.KEY";

/// Why a constraint cannot be read, or not be asked for. Texts are SwarmKit's, but that of the
/// unknown key, which matches no node there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Neither `==` nor `!=` is in it.
    #[error("constraint expected one operator from ==, !=: {expression:?}")]
    Operator {
        /// What was given.
        expression: String,
    },
    /// The part before the operator.
    #[error("key '{key}' is invalid in constraint {expression:?}")]
    Key {
        /// That part.
        key: String,
        /// What was given.
        expression: String,
    },
    /// The part before the operator names nothing that nodes have.
    #[error("invalid constraint key {key}: use {KEYS}")]
    UnknownKey {
        /// That part.
        key: String,
    },
    /// The part after the operator.
    #[error("value '{value}' is invalid in constraint {expression:?}")]
    Value {
        /// That part.
        value: String,
        /// What was given.
        expression: String,
    },
}

/// One constraint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Constraint {
    key: String,
    is_equal: bool,
    value: String,
}

impl std::fmt::Display for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.key, if self.is_equal { "==" } else { "!=" }, self.value)
    }
}

/// Reads the constraints of a spec.
pub fn parse_all(expressions: &[String]) -> Result<Vec<Constraint>, Error> {
    expressions.iter().map(|expression| parse(expression)).collect()
}

/// Refuses constraints that no node can ever meet, since nodes have nothing of that name.
pub fn check_keys(constraints: &[Constraint]) -> Result<(), Error> {
    let unknown = constraints.iter().find(|constraint| !constraint.is_known());
    unknown.map_or(Ok(()), |constraint| Err(Error::UnknownKey { key: constraint.key.clone() }))
}

/// Reads one constraint.
pub fn parse(expression: &str) -> Result<Constraint, Error> {
    let equal = expression.split_once("==").map(|(key, value)| (true, key, value));
    let split =
        equal.or_else(|| expression.split_once("!=").map(|(key, value)| (false, key, value)));
    let Some((is_equal, key, value)) = split else {
        return Err(Error::Operator { expression: expression.to_owned() });
    };
    let (key, value) = (key.trim(), value.trim());
    if !is_key(key) {
        return Err(Error::Key { key: key.to_owned(), expression: expression.to_owned() });
    }
    if value.is_empty() || !value.chars().all(is_value_char) {
        return Err(Error::Value { value: value.to_owned(), expression: expression.to_owned() });
    }
    Ok(Constraint { key: key.to_owned(), is_equal, value: value.to_owned() })
}

/// `^(?i)[a-z_][a-z0-9\-_.]+$`
fn is_key(key: &str) -> bool {
    let mut chars = key.chars();
    let first = chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
    first && key.len() >= 2 && chars.all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

/// `^(?i)[a-z0-9:\-_\s\.\*\(\)\?\+\[\]\\\^\$\|\/]+$`
fn is_value_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c.is_ascii_whitespace() || r":-_.*()?+[]\^$|/".contains(c)
}

/// Whether a node meets all constraints.
pub fn matches_all(constraints: &[Constraint], node: &Node) -> bool {
    constraints.iter().all(|constraint| constraint.matches(node))
}

impl Constraint {
    /// Whether a node meets the constraint.
    pub fn matches(&self, node: &Node) -> bool {
        let description = node.description.as_ref();
        let platform = description.map(|description| &description.platform);
        match self.key.to_ascii_lowercase().as_str() {
            "node.id" => self.compare(&node.id.to_string()),
            "node.hostname" => self.compare(description.map_or("", |d| &d.hostname)),
            "node.ip" => self.compare_address(&node.status.addr),
            "node.role" => self.compare(node.spec.role.name()),
            "node.platform.os" => self.compare(platform.map_or("", |platform| &platform.os)),
            "node.platform.arch" => {
                self.compare(platform.map_or("", |platform| &platform.architecture))
            }
            _ => self.matches_label(node),
        }
    }

    fn is_known(&self) -> bool {
        let attributes = [
            "node.id",
            "node.hostname",
            "node.ip",
            "node.role",
            "node.platform.os",
            "node.platform.arch",
        ];
        attributes.iter().any(|known| self.key.eq_ignore_ascii_case(known))
            || LabelKey::parse(&self.key).is_some()
    }

    fn matches_label(&self, node: &Node) -> bool {
        LabelKey::parse(&self.key).is_some_and(|key| self.compare(key.value(node)))
    }

    fn compare(&self, actual: &str) -> bool {
        // Values are ASCII by the grammar; a label may not be, and then equals none.
        actual.eq_ignore_ascii_case(&self.value) == self.is_equal
    }

    /// An address, or a network that contains it. SwarmKit: what is neither matches no node.
    fn compare_address(&self, actual: &str) -> bool {
        let Ok(actual) = actual.parse::<IpAddr>() else { return false };
        if let Ok(wanted) = self.value.parse::<IpAddr>() {
            return (wanted == actual) == self.is_equal;
        }
        self.value.parse::<IpNet>().is_ok_and(|net| net.contains(&actual) == self.is_equal)
    }
}

/// Which label of a node is meant by `node.labels.X` or `engine.labels.X`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LabelKey {
    is_of_engine: bool,
    label: String,
}

impl LabelKey {
    /// The case of the label's name counts, that of the prefix does not.
    pub(crate) fn parse(key: &str) -> Option<Self> {
        let under = |prefix: &str| {
            let (head, label) = key.split_at_checked(prefix.len())?;
            (head.eq_ignore_ascii_case(prefix) && !label.is_empty()).then(|| label.to_owned())
        };
        let of_node = under("node.labels.").map(|label| Self { is_of_engine: false, label });
        of_node.or_else(|| Some(Self { is_of_engine: true, label: under("engine.labels.")? }))
    }

    /// A node's value; empty where it has no such label.
    pub(crate) fn value<'a>(&self, node: &'a Node) -> &'a str {
        let engine = || node.description.as_ref().map(|description| &description.engine.labels);
        let labels = if self.is_of_engine { engine() } else { node.spec.labels.as_ref() };
        labels.and_then(|labels| labels.get(&self.label)).map_or("", String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use skep_common::object::NodeDescription;
    use skep_common::spec::Platform;

    use super::*;
    use crate::testing;

    #[test]
    fn expressions_are_read_or_refused_as_swarmkit_does() {
        for (expression, expect) in [
            ("node.role==manager", "node.role == manager"),
            (" node.labels.a  !=  b c ", "node.labels.a != b c"),
            ("node.ip == 10.0.0.0/8", "node.ip == 10.0.0.0/8"),
            ("a_==x", "a_ == x"),
            ("node.labels.a", "constraint expected one operator from ==, !=: \"node.labels.a\""),
            ("a==b", "key 'a' is invalid in constraint \"a==b\""),
            ("9a==b", "key '9a' is invalid in constraint \"9a==b\""),
            ("a b==c", "key 'a b' is invalid in constraint \"a b==c\""),
            ("ab==", "value '' is invalid in constraint \"ab==\""),
            ("ab==x=y", "value 'x=y' is invalid in constraint \"ab==x=y\""),
            ("ab==ä", "value 'ä' is invalid in constraint \"ab==ä\""),
        ] {
            let text = match parse(expression) {
                Ok(constraint) => constraint.to_string(),
                Err(error) => error.to_string(),
            };
            assert_eq!(text, expect, "{expression}");
        }
    }

    #[test]
    fn a_key_that_nodes_do_not_have_is_refused() {
        for (key, is_known) in [
            ("node.id", true),
            ("Node.Hostname", true),
            ("node.ip", true),
            ("NODE.ROLE", true),
            ("node.platform.os", true),
            ("node.platform.arch", true),
            ("node.labels.Zone", true),
            ("Engine.Labels.x", true),
            ("node.labels.", false),
            ("node.labels", false),
            ("node.platform", false),
            ("engine.label.x", false),
            ("zone", false),
        ] {
            let constraints = parse_all(&[format!("{key} == x")]).unwrap();
            let text = check_keys(&constraints).map_err(|error| error.to_string());
            let refusal = format!(
                "invalid constraint key {key}: use node.id, node.hostname, node.ip, node.role, \
                 node.platform.os, node.platform.arch, node.labels.KEY or engine.labels.KEY"
            );
            assert_eq!(text, if is_known { Ok(()) } else { Err(refusal) });
        }
    }

    #[test]
    fn a_node_meets_what_its_attributes_say() {
        let mut node = testing::node(3);
        node.status.addr = "10.1.2.3".to_owned();
        node.spec.labels = Some([("Disk".to_owned(), "SSD".to_owned())].into());
        let platform = Platform { os: "linux".into(), architecture: "x86_64".into() };
        let mut description =
            NodeDescription { hostname: "n3".into(), platform, ..NodeDescription::default() };
        description.engine.labels = [("rack".to_owned(), "7".to_owned())].into();
        node.description = Some(description);
        for (expression, expect) in [
            (format!("node.id == {}", node.id), true),
            ("node.hostname == N3".to_owned(), true),
            ("NODE.HOSTNAME != n3".to_owned(), false),
            ("node.ip == 10.1.2.3".to_owned(), true),
            ("node.ip != 10.1.0.0/16".to_owned(), false),
            ("node.ip == ten".to_owned(), false),
            ("node.ip != ten".to_owned(), false),
            ("node.role == worker".to_owned(), true),
            ("node.platform.os == linux".to_owned(), true),
            ("node.platform.arch == x86_64".to_owned(), true),
            ("Node.Labels.Disk == ssd".to_owned(), true),
            ("node.labels.disk == ssd".to_owned(), false),
            ("node.labels.none != x".to_owned(), true),
            ("node.labels.Disk == s*".to_owned(), false),
            ("engine.labels.rack == 7".to_owned(), true),
            ("node.colour != red".to_owned(), false),
        ] {
            assert_eq!(parse(&expression).unwrap().matches(&node), expect, "{expression}");
        }
    }
}
