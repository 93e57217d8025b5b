//! The root of certificates changes while the swarm works, and the page that tells how.

use std::collections::BTreeSet;

use skep_cluster_tests::{
    Lab, LabOptions, LoadOptions, Page, SETTLES_WITHIN, is_root_or_skip, wait_until,
};
use skep_runtime::clock;
use skep_runtime::identity::Authority;

const NODES: [&str; 5] = ["n1", "n2", "n3", "n4", "n5"];

fn n_sessions(lab: &Lab, node: &str) -> usize {
    lab.node(node).log().matches("session with the leader").count()
}

fn token(lab: &Lab) -> String {
    lab.node("n1").skep(&["swarm", "join-token", "-q", "worker"]).ok().text().to_owned()
}

fn root(lab: &Lab) -> String {
    lab.node("n1").skep(&["swarm", "ca"]).ok().text().to_owned()
}

/// What the node has on its disk: the roots that it trusts.
fn roots_of(lab: &Lab, node: &str) -> String {
    let path = "/var/lib/skep/certificates/swarm-root-ca.crt";
    lab.node(node).exec(&["cat", path]).ok().text().to_owned()
}

#[track_caller]
fn wait_until_trusted(lab: &Lab, nodes: &[&str], n_roots: usize) {
    for node in nodes {
        wait_until(SETTLES_WITHIN, &format!("{node} trusts {n_roots} roots"), || {
            let roots = roots_of(lab, node);
            ((roots.matches("BEGIN").count() == n_roots).then_some(()), roots)
        });
    }
}

/// It is waited for, and who joins meanwhile is told of both roots.
#[track_caller]
fn change_while_one_is_away(lab: &Lab, second_root: &str, [first_token, second_token]: [&str; 2]) {
    let n1 = lab.node("n1");
    lab.kill_daemon(&["n5"]);
    lab.wait_for_node("n1", "n5", "Down");
    n1.skep(&["swarm", "ca", "--rotate", "--detach"]).ok();
    wait_until_trusted(lab, &NODES[..4], 2);
    assert_eq!(root(lab), second_root);
    let n4 = lab.node("n4");
    n4.skep(&["swarm", "leave"]).ok();
    lab.wait_for_node("n1", "n4", "Down");
    let listed = n1.skep(&["node", "ls", "--format", "{{.ID}} {{.Hostname}}"]).ok();
    let line = listed.text().lines().find(|line| line.ends_with(" n4")).expect("it is there");
    n1.skep(&["node", "rm", "--force", line.split([' ', '*']).next().expect("an id")]).ok();
    let address = format!("{}:2377", n1.address());
    let foreign = n4.skep(&["swarm", "join", "--token", first_token, &address]).err();
    assert!(foreign.contains("the join token is for another swarm"), "{foreign}");
    n4.skep(&["swarm", "join", "--token", second_token, &address]).ok();
    wait_until_trusted(lab, &["n4"], 2);
    lab.start_nodes(&["n5"]);
    wait_until(SETTLES_WITHIN, "the second change ends", || {
        let now = root(lab);
        ((now != second_root).then_some(()), now)
    });
    wait_until_trusted(lab, &NODES, 1);
    let roots: BTreeSet<String> = NODES.iter().map(|node| roots_of(lab, node)).collect();
    assert_eq!(roots, BTreeSet::from([root(lab)]));
}

#[test]
fn the_root_changes_while_requests_and_sessions_go_on() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 3, workers: 2, ..LabOptions::default() });
    lab.import_whoami();
    let n1 = lab.node("n1");
    n1.create_whoami("web", &["--publish", "8080:8080", "--replicas", "5"]);
    lab.wait_until_settled("n1", "web", 5);
    let (first_root, first_token) = (root(&lab), token(&lab));
    let before = NODES.map(|node| n_sessions(&lab, node));
    let url = |node: &&str| format!("http://{}:8080/", lab.node(node).address());
    let load = lab.load("client", &LoadOptions::to(NODES.iter().map(url)));
    let mut held = lab.hold("client", &url(&"n4"));
    assert!(held.request("/").is_ok());

    let rotated = n1.skep(&["swarm", "ca", "--rotate"]).ok();
    let second_root = root(&lab);
    assert_ne!(first_root, second_root);
    assert_eq!(rotated.text(), second_root);
    let said = &rotated.stderr;
    assert!(said.contains("rotated CA certificates: ") && said.contains("/5 nodes"), "{said}");
    wait_until_trusted(&lab, &NODES, 1);
    for node in NODES {
        assert_eq!(roots_of(&lab, node), second_root, "{node}");
    }
    let second_token = token(&lab);
    let parts = |token: &str| token.split('-').map(str::to_owned).collect::<Vec<_>>();
    assert_ne!(parts(&first_token)[2], parts(&second_token)[2], "the digest is of the new root");
    assert_eq!(parts(&first_token)[3], parts(&second_token)[3], "the secret stays");

    assert!(held.request("/").is_ok(), "the connection that was open before");

    // New work, over connections that were open and over new ones; an image is fetched with a new grant.
    n1.skep(&["service", "update", "--force", "web"]).ok();
    lab.wait_until_settled("n1", "web", 5);
    assert_eq!(NODES.map(|node| n_sessions(&lab, node)), before, "no session was dropped");
    load.stop().assert_none_failed();

    change_while_one_is_away(&lab, &second_root, [&first_token, &second_token]);

    // From disk: managers and workers find each other again.
    for node in ["n2", "n5"] {
        lab.kill_daemon(&[node]);
        lab.start_nodes(&[node]);
        lab.wait_for_node("n1", node, "Ready");
    }
    lab.wait_until_settled("n1", "web", 5);
}

#[test]
fn the_pages_commands_do_what_it_says() {
    if !is_root_or_skip() {
        return;
    }
    let lab = Lab::start(LabOptions { managers: 1, workers: 1, ..LabOptions::default() });
    let root = Authority::generate(clock::now()).expect("a root of its own");
    let files = [("root.pem", root.root_pem()), ("root-key.pem", root.key_pem())];
    let n1 = lab.node("n1");
    for (name, text) in files {
        n1.exec(&["sh", "-ec", &format!("umask 077; cat > /root/{name} <<'END'\n{text}\nEND")])
            .ok();
    }
    Page::read("ca.md").run_all(&lab);
    n1.exec(&["rm", "/root/root.pem", "/root/root-key.pem"]).ok();
    let now = n1.skep(&["swarm", "ca"]).ok();
    assert_eq!(now.text(), root.root_pem().trim());
    lab.down();
}
