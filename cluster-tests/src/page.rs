//! Pages of `docs/operations`, whose commands tests run.
//!
//! A block ```` ```sh ```` of a page is run by the shell of a node, all lines or none: the first that fails is the
//! test's failure. A block for another node names it behind that, as in ```` ```sh n2 ````, which readers do not
//! see. `systemctl` starts and ends the node's daemon, as systemd would. What is different for each
//! swarm is a word in capitals, such as `NODE`, for which the test gives a value.
//!
//! Blocks that are not to be run, such as what a command prints, are ```` ```text ````.

use std::collections::BTreeMap;
use std::path::Path;

use crate::command::Output;
use crate::lab::Lab;
use crate::wait::step;

/// Where a block without a node's name is run.
const FIRST: &str = "n1";

/// A page, and what of it has been run.
#[derive(Debug)]
pub struct Page {
    name: String,
    blocks: Vec<Block>,
    values: BTreeMap<String, String>,
    dir: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
struct Block {
    /// The title above it.
    section: String,
    node: String,
    commands: String,
    has_run: bool,
}

impl Page {
    /// Reads a page, such as `ca.md`.
    #[track_caller]
    pub fn read(name: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operations");
        let text = std::fs::read_to_string(dir.join(name));
        let text = text.unwrap_or_else(|error| panic!("{name}: {error}"));
        let blocks = parse(&text);
        assert!(!blocks.is_empty(), "{name} has no commands");
        Self { name: name.to_owned(), blocks, values: BTreeMap::new(), dir: None }
    }

    /// Gives a word in capitals its value for the blocks that are run from now on.
    pub fn set(&mut self, word: &str, value: &str) {
        self.values.insert(word.to_owned(), value.to_owned());
    }

    /// Says in which directory blocks are run from now on.
    pub fn set_dir(&mut self, dir: &str) {
        self.dir = Some(dir.to_owned());
    }

    /// Runs the blocks below a title, in order; gives what they printed.
    #[track_caller]
    pub fn run(&mut self, lab: &Lab, section: &str) -> Vec<Output> {
        let Self { name, blocks, values, dir } = self;
        let wanted: Vec<&mut Block> = blocks.iter_mut().filter(|b| b.section == section).collect();
        assert!(!wanted.is_empty(), "{name} has no commands below {section:?}");
        let run = |block: &mut Block| {
            block.has_run = true;
            block.run(lab, values, dir.as_deref())
        };
        wanted.into_iter().flat_map(run).collect()
    }

    /// Runs all blocks in order.
    #[track_caller]
    pub fn run_all(mut self, lab: &Lab) {
        for block in &mut self.blocks {
            block.has_run = true;
            block.run(lab, &self.values, self.dir.as_deref());
        }
        self.finish();
    }

    /// Fails if a command of the page was not run.
    #[track_caller]
    pub fn finish(self) {
        let left: Vec<&Block> = self.blocks.iter().filter(|block| !block.has_run).collect();
        assert!(left.is_empty(), "{}: not run: {left:#?}", self.name);
    }
}

impl Block {
    #[track_caller]
    fn run(&self, lab: &Lab, values: &BTreeMap<String, String>, dir: Option<&str>) -> Vec<Output> {
        let commands = fill(&self.commands, values);
        step(&format!("{}, on {}:\n{commands}", self.section, self.node));
        let node = lab.node(&self.node);
        let exec = |script: &str| {
            let dir = dir.map_or(String::new(), |dir| format!("cd '{dir}'\n"));
            node.exec(&["sh", "-ec", &(dir + script)]).ok()
        };
        let mut outputs = Vec::new();
        let mut script = String::new();
        for line in commands.lines() {
            let Some(action) = daemon_action(line) else {
                script = script + line + "\n";
                continue;
            };
            if !script.is_empty() {
                outputs.push(exec(&std::mem::take(&mut script)));
            }
            if action != "start" {
                node.signal_daemon("TERM");
                lab.wait_for_daemon_end(&self.node);
            }
            if action != "stop" {
                lab.start_nodes(&[&self.node]);
            }
        }
        if !script.is_empty() {
            outputs.push(exec(&script));
        }
        outputs
    }
}

/// Puts values in the places of their words.
fn fill(commands: &str, values: &BTreeMap<String, String>) -> String {
    let is_of_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    let mut filled = String::new();
    for part in commands.split_inclusive(|c: char| !is_of_word(c)) {
        let word = part.trim_end_matches(|c: char| !is_of_word(c));
        filled += values.get(word).map_or(word, String::as_str);
        filled += &part[word.len()..];
    }
    filled
}

/// What systemd is to do with the daemon.
fn daemon_action(line: &str) -> Option<&str> {
    let action = line.trim().strip_prefix("systemctl ")?.strip_suffix(" skep")?;
    matches!(action, "start" | "stop" | "restart").then_some(action)
}

fn parse(text: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut section = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let indent = line.len() - line.trim_start().len();
        if line.starts_with('#') {
            section = line.trim_start_matches('#').trim().to_owned();
        } else if let Some(info) = line.trim_start().strip_prefix("```") {
            let body: Vec<&str> = lines.by_ref().take_while(|line| line.trim() != "```").collect();
            let mut words = info.split_whitespace();
            if words.next() == Some("sh") {
                let commands: Vec<&str> =
                    body.iter().map(|line| line.get(indent..).unwrap_or_default()).collect();
                let node = words.next().unwrap_or(FIRST).to_owned();
                let (section, commands) = (section.clone(), commands.join("\n"));
                blocks.push(Block { section, node, commands, has_run: false });
            }
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_their_titles_and_nodes() {
        let text = "# Page\n\n```text\n# no title\n```\n\n## One\n\n1. first\n   ```sh\n   a\n     b\n   ```\n\
                    ## Two\n```sh n2\nc\n```\n```toml\nd\n```\n";
        let block = |section: &str, node: &str, commands: &str| Block {
            section: section.into(),
            node: node.into(),
            commands: commands.into(),
            has_run: false,
        };
        assert_eq!(parse(text), [block("One", "n1", "a\n  b"), block("Two", "n2", "c")]);
    }

    #[test]
    fn words_have_their_values() {
        let values = BTreeMap::from([("NODE".to_owned(), "n3".to_owned())]);
        let text = "node rm NODE\nUNNODE A-NODE NODE_ID NODE:1 \"$NODE\"";
        assert_eq!(fill(text, &values), "node rm n3\nUNNODE A-NODE NODE_ID n3:1 \"$n3\"");
    }

    #[test]
    fn only_the_daemon_is_systemds() {
        assert_eq!(daemon_action("systemctl restart skep"), Some("restart"));
        assert_eq!(daemon_action("  systemctl stop skep"), Some("stop"));
        assert_eq!(daemon_action("systemctl restart docker"), None);
        assert_eq!(daemon_action("skep swarm leave"), None);
    }
}
