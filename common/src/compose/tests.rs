//! Whole files in, specs and sentences out.
//!
//! `golden/NAME.yml`, under `golden/NAME.over.yml` where there is one, gives `golden/NAME.out`: the
//! warnings and the specs, or the errors. `UPDATE_GOLDEN=1` rewrites those; the diff is reviewed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::*;

fn environment() -> BTreeMap<String, String> {
    [("TAG", "1.2"), ("HOME_VALUE", "from the caller"), ("EMPTY", "")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/compose/golden")
}

/// The one file that the documents may name.
fn file(path: &str) -> Result<Vec<u8>, String> {
    match path {
        "./key.txt" => Ok(b"hidden".to_vec()),
        _ => Err("No such file or directory (os error 2)".to_owned()),
    }
}

/// The files of a case, in the order in which they are given.
fn sources(case: &str) -> Vec<Source> {
    let names = [format!("{case}.yml"), format!("{case}.over.yml")];
    names
        .into_iter()
        .filter_map(|name| {
            let text = std::fs::read_to_string(directory().join(&name)).ok()?;
            Some(Source { name, text })
        })
        .collect()
}

fn rendered(case: &str) -> String {
    match load("shop", &sources(case), &environment(), &file) {
        Ok(Loaded { spec, warnings }) => {
            let warnings: String =
                warnings.iter().map(|text| format!("warning {text}\n")).collect();
            let services = serde_json::to_string_pretty(&spec.services).unwrap();
            let networks = serde_json::to_string_pretty(&spec.networks).unwrap();
            let mut out = format!("{warnings}{services}\nnetworks {networks}\n");
            for (name, list) in [
                ("secrets", serde_json::to_value(&spec.secrets).unwrap()),
                ("configs", serde_json::to_value(&spec.configs).unwrap()),
            ] {
                if list != serde_json::json!([]) {
                    let list = serde_json::to_string_pretty(&list).unwrap();
                    out.push_str(&format!("{name} {list}\n"));
                }
            }
            out
        }
        Err(Errors(errors)) => errors.iter().map(|text| format!("error {text}\n")).collect(),
    }
}

#[test]
fn files_give_their_golden_specs_and_sentences() {
    let files = std::fs::read_dir(directory()).unwrap();
    let names: BTreeSet<String> =
        files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    let cases: Vec<&str> = names
        .iter()
        .filter(|name| !name.ends_with(".over.yml"))
        .filter_map(|name| name.strip_suffix(".yml"))
        .collect();
    assert_eq!(
        names.iter().filter(|name| name.ends_with(".out")).count(),
        cases.len(),
        "{names:?}"
    );
    for case in cases {
        let path = directory().join(format!("{case}.out"));
        let got = rendered(case);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, &got).unwrap();
        }
        assert_eq!(got, std::fs::read_to_string(&path).unwrap(), "{case}");
        assert_eq!(got, rendered(case), "{case}: the same files give the same specs");
    }
}

#[test]
fn the_merged_document_reads_back_as_itself() {
    for case in ["small", "full", "merge"] {
        let yaml = config(&sources(case), Some(&environment())).unwrap();
        let again = [Source { name: "again".into(), text: yaml.replace('$', "$$") }];
        let specs = |sources: &[Source]| load("shop", sources, &environment(), &file).unwrap().spec;
        assert_eq!(specs(&again), specs(&sources(case)), "{case}:\n{yaml}");
    }
    let untouched = config(&sources("full"), None).unwrap();
    assert!(untouched.contains("${REPLICAS:-3}"), "{untouched}");
}

#[test]
fn stack_names_are_checked() {
    for (name, is_good) in
        [("shop", true), ("a.b_c-1", true), ("", false), ("-a", false), ("a b", false)]
    {
        let loaded = load(name, &sources("small"), &environment(), &file);
        assert_eq!(loaded.is_ok(), is_good, "{name}");
    }
    let long = "x".repeat(60);
    let error = load(&long, &sources("small"), &environment(), &file).unwrap_err().to_string();
    assert!(error.contains("is longer than 63 characters; shorten it"), "{error}");
}
