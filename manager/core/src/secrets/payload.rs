//! What secrets and configs have in common.

use std::collections::BTreeMap;
use std::sync::Arc;

use skep_common::object::{Config, DataVersion, Meta, Secret};
use skep_common::spec::{Base64, ConfigSpec, Driver, Labels, SecretSpec};
use skep_common::{ConfigId, Kind, Object, SecretId};

use crate::store::State;

/// What users want of a secret or a config.
pub trait PayloadSpec: Clone + PartialEq + serde::de::DeserializeOwned {
    /// Its unique name.
    fn name(&self) -> &str;
    /// Its labels.
    fn labels(&self) -> Option<&Labels>;
    /// Its labels, to be changed.
    fn labels_mut(&mut self) -> &mut Option<Labels>;
    /// Its bytes, in requests.
    fn data(&self) -> Option<&Base64>;
    /// Gives it bytes, or takes them away.
    fn set_data(&mut self, data: Option<Base64>);
    /// What keeps its bytes in place of the swarm.
    fn driver(&self) -> Option<&Driver>;
    /// What fills in its bytes for each task.
    fn templating(&self) -> Option<&Driver>;
}

/// A secret or a config.
pub trait Payload: Clone + 'static {
    /// What users want of it.
    type Spec: PayloadSpec;
    /// Which of the two.
    const KIND: Kind;
    /// Its bytes are fewer: each is an entry of the log, and in the memory of managers.
    const BYTES_MAX: usize;

    /// One of the store.
    fn find(state: &State, id: u128) -> Option<&Arc<Self>>;
    /// Those of the store, by id.
    fn all(state: &State) -> impl Iterator<Item = &Arc<Self>>;
    /// A new one.
    fn new(id: u128, spec: Self::Spec, versions: BTreeMap<u64, DataVersion>) -> Self;
    /// The 128 bits of its id.
    fn raw_id(&self) -> u128;
    /// Bookkeeping.
    fn meta(&self) -> Meta;
    /// Its spec.
    fn spec(&self) -> &Self::Spec;
    /// Its spec, to be changed.
    fn spec_mut(&mut self) -> &mut Self::Spec;
    /// Its versions.
    fn versions(&self) -> &BTreeMap<u64, DataVersion>;
    /// Its versions, to be changed.
    fn versions_mut(&mut self) -> &mut BTreeMap<u64, DataVersion>;
    /// The same as an object.
    fn into_object(self) -> Object;
}

macro_rules! payload {
    ($object:ident, $id:ident, $spec:ident, $one:ident, $all:ident, $driver:expr, $max:expr) => {
        impl PayloadSpec for $spec {
            fn name(&self) -> &str {
                &self.name
            }
            fn labels(&self) -> Option<&Labels> {
                self.labels.as_ref()
            }
            fn labels_mut(&mut self) -> &mut Option<Labels> {
                &mut self.labels
            }
            fn data(&self) -> Option<&Base64> {
                self.data.as_ref()
            }
            fn set_data(&mut self, data: Option<Base64>) {
                self.data = data;
            }
            fn driver(&self) -> Option<&Driver> {
                let driver: fn(&Self) -> Option<&Driver> = $driver;
                driver(self).filter(|driver| !driver.name.is_empty())
            }
            fn templating(&self) -> Option<&Driver> {
                self.templating.as_ref().filter(|driver| !driver.name.is_empty())
            }
        }

        impl Payload for $object {
            type Spec = $spec;
            const KIND: Kind = Kind::$object;
            const BYTES_MAX: usize = $max;

            fn find(state: &State, id: u128) -> Option<&Arc<Self>> {
                state.$one($id(id))
            }
            fn all(state: &State) -> impl Iterator<Item = &Arc<Self>> {
                state.$all().values()
            }
            fn new(id: u128, spec: $spec, versions: BTreeMap<u64, DataVersion>) -> Self {
                Self { id: $id(id), meta: Meta::default(), spec, versions }
            }
            fn raw_id(&self) -> u128 {
                self.id.0
            }
            fn meta(&self) -> Meta {
                self.meta
            }
            fn spec(&self) -> &$spec {
                &self.spec
            }
            fn spec_mut(&mut self) -> &mut $spec {
                &mut self.spec
            }
            fn versions(&self) -> &BTreeMap<u64, DataVersion> {
                &self.versions
            }
            fn versions_mut(&mut self) -> &mut BTreeMap<u64, DataVersion> {
                &mut self.versions
            }
            fn into_object(self) -> Object {
                Object::$object(Box::new(self))
            }
        }
    };
}

// The sizes are Swarm's.
payload!(Secret, SecretId, SecretSpec, secret, secrets, |spec| spec.driver.as_ref(), 500 * 1024);
payload!(Config, ConfigId, ConfigSpec, config, configs, |_| None, 1000 * 1024);
