//! `network create` and `rm`. What is allowed and what follows is decided in the core.

use skep_common::spec::NetworkSpec;
use skep_common::{Kind, NetworkId, Object};
use skep_manager_core::{Refusal, network};
use skep_proto::CreateNetworkResponse;

use super::error::Error;
use super::{ControlService, lookup, parse_id};

pub(super) async fn create(
    control: &ControlService,
    spec: NetworkSpec,
) -> Result<CreateNetworkResponse, Error> {
    loop {
        let state = control.read().await?;
        let id = NetworkId::random(&mut rand::rng());
        let (id, action) = network::create(&state, id, spec.clone())?;
        match control.write(vec![action]).await {
            // Two writers were given one identifier, or one name: the next view decides.
            Err(Error::Refused(Refusal::VniInUse { .. } | Refusal::NameTaken { .. })) => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok(CreateNetworkResponse { id: id.to_string(), warnings: Vec::new() }),
        }
    }
}

pub(super) async fn remove(control: &ControlService, id: &str) -> Result<(), Error> {
    let network_id = NetworkId(parse_id(Kind::Network, id)?);
    loop {
        let state = control.read().await?;
        let network = match lookup::object(&state, Kind::Network, network_id.0) {
            Some(Object::Network(network)) => network,
            _ => return Err(Error::NotFound { kind: "network", reference: id.to_owned() }),
        };
        let Some(action) = network::remove(&state, &network)? else { return Ok(()) };
        match control.write(vec![action]).await {
            // A service came onto it meanwhile, or it is gone: the next view says so.
            Err(Error::Refused(
                Refusal::OutOfSequence { .. }
                | Refusal::NetworkInUse { .. }
                | Refusal::NotFound { .. },
            )) => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok(()),
        }
    }
}
