//! `--filter key=value`: values of one key are alternatives, keys must all hold.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

/// One `--filter`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Filter {
    key: String,
    value: String,
}

impl Filter {
    /// Its key and its value, for a daemon that filters.
    pub(super) fn pair(&self) -> (&str, &str) {
        (&self.key, &self.value)
    }
}

/// Reads `key=value`.
pub(super) fn parse(text: &str) -> Result<Filter, String> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => {
            Ok(Filter { key: key.trim().to_ascii_lowercase(), value: value.trim().to_owned() })
        }
        _ => Err("invalid filter: write key=value".into()),
    }
}

/// The filters of one command.
#[derive(Debug)]
pub(super) struct Filters(BTreeMap<String, Vec<String>>);

impl Filters {
    /// Refuses keys that the command does not know.
    pub(super) fn new(filters: &[Filter], known: &[&str]) -> Result<Self> {
        let mut by_key: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for Filter { key, value } in filters {
            if !known.contains(&key.as_str()) {
                bail!("invalid filter '{key}': use one of {}", known.join(", "));
            }
            by_key.entry(key.clone()).or_default().push(value.clone());
        }
        Ok(Self(by_key))
    }

    /// Whether some value of `key` satisfies `test`, or the key was not given.
    pub(super) fn is_match(&self, key: &str, test: impl Fn(&str) -> bool) -> bool {
        self.0.get(key).is_none_or(|values| values.iter().any(|value| test(value)))
    }

    /// Whether `labels` has every label of the filters: `name` or `name=value`.
    pub(super) fn match_labels(
        &self,
        key: &str,
        labels: Option<&BTreeMap<String, String>>,
    ) -> bool {
        let has = |wanted: &String| {
            let (name, value) = match wanted.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (wanted.as_str(), None),
            };
            let found = labels.and_then(|labels| labels.get(name));
            found.is_some_and(|found| value.is_none_or(|value| value == found))
        };
        self.0.get(key).is_none_or(|values| values.iter().all(has))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_hold() {
        let filters: Vec<Filter> = ["name=web", "name=api", "label=a=1", "label=b"]
            .into_iter()
            .map(|text| parse(text).unwrap())
            .collect();
        let filters = Filters::new(&filters, &["name", "label", "id"]).unwrap();
        assert!(filters.is_match("name", |value| value == "api"));
        assert!(!filters.is_match("name", |value| value == "db"));
        assert!(filters.is_match("id", |_| false));
        let labels = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect::<BTreeMap<_, _>>()
        };
        assert!(filters.match_labels("label", Some(&labels(&[("a", "1"), ("b", "")]))));
        assert!(!filters.match_labels("label", Some(&labels(&[("a", "2"), ("b", "")]))));
        assert!(!filters.match_labels("label", None));
        assert!(Filters::new(&[parse("x=1").unwrap()], &["id"]).is_err());
        assert!(parse("name").is_err());
    }
}
