//! What is deleted, and what is not, with a store on a real disk.

use std::time::Duration;

use skep_common::spec::NodeRole;
use skep_common::{ClusterId, NodeId};
use skep_runtime::clock;
use skep_runtime::identity::{Authority, Credentials, Csr};
use skep_runtime::transport::Tls;

use super::*;
use crate::images::Loaded;

/// A pool whose channels nobody answers.
fn pool() -> ChannelPool {
    let (authority, csr) = (Authority::generate(clock::now()).unwrap(), Csr::generate().unwrap());
    let (node_id, role, life) = (NodeId(1), NodeRole::Worker, Duration::from_secs(3600));
    let signed =
        authority.sign(&csr.csr_pem, node_id, role, ClusterId(1), clock::now(), life).unwrap();
    let root_pem = authority.root_pem().to_owned();
    let credentials = Credentials { certificate_pem: signed, key_pem: csr.key_pem, root_pem };
    ChannelPool::new(Tls::new(credentials).unwrap())
}

/// An image with one file, which is named like the image.
pub(crate) async fn import(store: &ImageStore, name: &str) -> Loaded {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o644);
    archive.append_data(&mut header, name, std::io::empty()).unwrap();
    let archive = std::io::Cursor::new(archive.into_inner().unwrap());
    store.import(archive, Some(name), &[]).await.unwrap()
}

/// Waits until exactly these images are complete in the store.
pub(crate) async fn until_stored(store: &ImageStore, expect: &[Digest]) {
    let expect: BTreeSet<Digest> = expect.iter().copied().collect();
    let wait = async {
        loop {
            let stored = store.list().await.unwrap();
            let stored: BTreeSet<Digest> = stored.iter().map(|image| image.digest).collect();
            assert!(stored.is_superset(&expect), "{expect:?} of {stored:?}");
            if stored == expect {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), wait).await.expect("the others are deleted");
}

fn assigned(digests: &[Digest]) -> Vec<ImageAssignment> {
    let assignment =
        |digest: &Digest| ImageAssignment { digest: digest.to_string(), ..Default::default() };
    digests.iter().map(assignment).collect()
}

#[tokio::test]
async fn a_new_session_deletes_what_nobody_needs() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path()).await.unwrap();
    let mut digests = Vec::new();
    for name in ["assigned", "of-a-task", "given-up"] {
        digests.push(import(&store, name).await.digest);
    }
    let [kept, used, surplus] = digests[..] else { panic!("three images") };
    let tasks = TaskSet::new();
    let images = Images::new(store.clone(), pool(), tasks.clone()).await.unwrap();
    images.note_in_use([used].into());
    // One was loaded and its name is not an object yet, the other is only being loaded.
    let loaded = import(&store, "loaded").await.digest;
    images.note_loaded(&loaded.to_string());
    let loading = import(&store, "loading").await;
    until_stored(&store, &[kept, used, surplus, loaded, loading.digest]).await;

    images.assign(true, assigned(&[kept]), &[]);
    until_stored(&store, &[kept, used, loaded, loading.digest]).await;
    images.note_loaded(&loading.digest.to_string());
    let loading = loading.digest;
    images.assign(true, assigned(&[kept]), &[]);
    images.assign(false, assigned(&[loaded]), &[]);
    until_stored(&store, &[kept, used, loaded, loading]).await;
    assert!(images.held().contains(&loaded.to_string()));

    images.assign(true, assigned(&[kept]), &[]);
    until_stored(&store, &[kept, used, loading]).await;
    assert!(!images.held().contains(&loaded.to_string()), "it had been named, and is not any more");
    images.note_in_use(BTreeSet::new());
    until_stored(&store, &[kept, loading]).await;
    images.assign(false, Vec::new(), &[kept.to_string()]);
    until_stored(&store, &[loading]).await;
    assert_eq!(images.held(), [loading.to_string()]);
    tasks.shutdown().await;
}
