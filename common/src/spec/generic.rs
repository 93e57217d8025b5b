//! What people write of generic resources: `SSD=3`, `GPU=UUID1`.

use std::collections::{BTreeMap, BTreeSet};

use super::GenericResource;

/// Reads what a node has: a number of a kind, or names, one at a time.
pub fn parse_of_node(texts: &[String]) -> Result<Vec<GenericResource>, String> {
    let mut numbers = BTreeMap::new();
    let mut names: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for text in texts {
        let (kind, value) = split(text)?;
        let is_new = match value.parse::<i64>() {
            Ok(number) if number < 1 => {
                return Err(format!("generic resource {text:?}: a number must be 1 or more"));
            }
            Ok(number) => numbers.insert(kind, number).is_none(),
            Err(_) => names.entry(kind).or_default().insert(value),
        };
        if !is_new {
            return Err(format!("generic resource {text:?}: {kind} was given already"));
        }
        if numbers.contains_key(kind) && names.contains_key(kind) {
            return Err(format!(
                "generic resource {text:?}: {kind} is either a number or has names, not both"
            ));
        }
    }
    let numbers = numbers.into_iter().map(|(kind, value)| discrete(kind, value));
    let names = names.into_iter().flat_map(|(kind, values)| {
        values.into_iter().map(move |value| GenericResource::Named {
            kind: kind.to_owned(),
            value: value.to_owned(),
        })
    });
    let mut all: Vec<GenericResource> = numbers.chain(names).collect();
    all.sort();
    Ok(all)
}

/// Reads what a task needs: a number of a kind.
pub fn parse_wanted(text: &str) -> Result<GenericResource, String> {
    let (kind, value) = split(text)?;
    match value.parse::<i64>() {
        Ok(number @ 1..) => Ok(discrete(kind, number)),
        _ => Err(format!("generic resource {text:?}: write a number of 1 or more, as GPU=2")),
    }
}

/// Whether a kind can be written, and be part of a variable's name.
pub fn is_kind(kind: &str) -> bool {
    !kind.is_empty() && kind.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

fn split(text: &str) -> Result<(&str, &str), String> {
    let parts = text.split_once('=').map(|(kind, value)| (kind.trim(), value.trim()));
    let is_text =
        |value: &str| !value.is_empty() && !value.contains(|c: char| c == ',' || c.is_whitespace());
    parts.filter(|(kind, value)| is_kind(kind) && is_text(value)).ok_or_else(|| {
        format!("generic resource {text:?}: write KIND=VALUE, as SSD=3 or GPU=UUID1")
    })
}

fn discrete(kind: &str, value: i64) -> GenericResource {
    GenericResource::Discrete { kind: kind.to_owned(), value }
}

/// The variables that tell a container what it was given: `DOCKER_RESOURCE_GPU=UUID1,UUID2`.
pub fn environment(given: &[GenericResource]) -> Vec<String> {
    let mut values: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for resource in given {
        let value = match resource {
            GenericResource::Named { value, .. } => value.clone(),
            GenericResource::Discrete { value, .. } => value.to_string(),
        };
        values.entry(resource.kind()).or_default().push(value);
    }
    let line = |(kind, values): (&str, Vec<String>)| {
        format!("DOCKER_RESOURCE_{}={}", kind.to_ascii_uppercase(), values.join(","))
    };
    values.into_iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_have_numbers_or_names() {
        for (texts, expect) in [
            ("", Ok("")),
            ("SSD=3 GPU=b GPU=a", Ok("DOCKER_RESOURCE_GPU=a,b DOCKER_RESOURCE_SSD=3")),
            ("nvidia-gpu=UUID-1", Ok("DOCKER_RESOURCE_NVIDIA-GPU=UUID-1")),
            ("GPU=a GPU=2", Err("either a number or has names, not both")),
            ("GPU=2 GPU=a", Err("either a number or has names, not both")),
            ("SSD=1 SSD=2", Err("SSD was given already")),
            ("GPU=a GPU=a", Err("GPU was given already")),
            ("SSD=0", Err("must be 1 or more")),
            ("SSD", Err("write KIND=VALUE")),
            ("=3", Err("write KIND=VALUE")),
            ("SSD=", Err("write KIND=VALUE")),
            ("GPU=a,b", Err("write KIND=VALUE")),
        ] {
            let texts: Vec<String> = texts.split_whitespace().map(str::to_owned).collect();
            match (parse_of_node(&texts), expect) {
                (Ok(all), Ok(expect)) => assert_eq!(environment(&all).join(" "), expect),
                (Err(error), Err(expect)) => assert!(error.contains(expect), "{error}"),
                (got, _) => panic!("{texts:?}: {got:?}"),
            }
        }
    }

    #[test]
    fn tasks_need_numbers() {
        assert_eq!(parse_wanted("GPU=2"), Ok(discrete("GPU", 2)));
        for text in ["GPU", "GPU=0", "GPU=-1", "GPU=UUID1", "=2", "G U=2"] {
            assert!(parse_wanted(text).is_err(), "{text}");
        }
    }
}
