//! Which instances this driver holds: at most one task per generation, and none for one that is over.

use std::collections::HashMap;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::watch;

use crate::domain::ids::{Generation, ServiceName};
use crate::domain::spec::ServiceSpec;
use crate::domain::time::Timestamp;

/// Tries to find a free port that no instance of ours was promised.
const PORT_TRIES: u32 = 100;

/// Where an instance is reached and how it wants to be called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Without a slash at its end.
    pub base_url: String,
    /// As it was when the instance started.
    pub spec: Arc<ServiceSpec>,
}

/// One instance's place.
#[derive(Debug)]
pub(super) struct Slot {
    /// When to KILL; set by the first stop, only ever brought forward.
    pub stop: watch::Sender<Option<Timestamp>>,
    pub endpoint: OnceLock<Arc<Endpoint>>,
    /// Promised before its process binds it.
    pub port: OnceLock<u16>,
}

/// All instances' places.
#[derive(Default)]
pub(super) struct Table {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    slots: HashMap<(ServiceName, Generation), Arc<Slot>>,
    /// The generation of each service that ended here last: a stop that crossed its end on the way needs no answer.
    ended: HashMap<ServiceName, Generation>,
}

impl Table {
    /// A new place, or `None` when this generation has one.
    pub fn enter(&self, service: &ServiceName, generation: Generation) -> Option<Arc<Slot>> {
        let mut inner = self.lock();
        let key = (service.clone(), generation);
        if inner.slots.contains_key(&key) {
            return None;
        }
        let slot = Arc::new(Slot {
            stop: watch::Sender::new(None),
            endpoint: OnceLock::new(),
            port: OnceLock::new(),
        });
        inner.slots.insert(key, slot.clone());
        Some(slot)
    }

    /// Everything about this instance was reported.
    pub fn leave(&self, service: &ServiceName, generation: Generation) {
        let mut inner = self.lock();
        inner.slots.remove(&(service.clone(), generation));
        inner.ended.insert(service.clone(), generation);
    }

    /// `false` when this generation was never seen here.
    pub fn stop(&self, service: &ServiceName, generation: Generation, kill_at: Timestamp) -> bool {
        let inner = self.lock();
        let Some(slot) = inner.slots.get(&(service.clone(), generation)) else {
            return inner.ended.get(service) == Some(&generation);
        };
        slot.stop.send_if_modified(|stop| {
            let earlier = stop.is_none_or(|at| kill_at < at);
            if earlier {
                *stop = Some(kill_at);
            }
            earlier
        });
        true
    }

    pub fn endpoint(&self, service: &ServiceName, generation: Generation) -> Option<Arc<Endpoint>> {
        self.lock()
            .slots
            .get(&(service.clone(), generation))?
            .endpoint
            .get()
            .cloned()
    }

    pub fn holds(&self, service: &ServiceName, generation: Generation) -> bool {
        self.lock()
            .slots
            .contains_key(&(service.clone(), generation))
    }

    /// The port for `slot`: the asked one if nobody listens there, or a free one for 0. The error is for people.
    pub fn choose_port(&self, slot: &Slot, asked: u16) -> Result<u16, String> {
        let inner = self.lock();
        for _ in 0..PORT_TRIES {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, asked))
                .map_err(|error| format!("port {asked} on 127.0.0.1 cannot be used: {error}"))?;
            let port = listener
                .local_addr()
                .map_err(|error| error.to_string())?
                .port();
            let promised = inner
                .slots
                .values()
                .any(|other| other.port.get() == Some(&port));
            if asked == 0 && promised {
                continue;
            }
            let _ = slot.port.set(port);
            return Ok(port);
        }
        Err("no free port was found on 127.0.0.1".into())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it is held; each change is whole in itself.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_lives_once() {
        let table = Table::default();
        let name = ServiceName::new("s");
        assert!(table.enter(&name, Generation(2)).is_some());
        assert!(table.enter(&name, Generation(2)).is_none(), "it lives");
        table.leave(&name, Generation(2));
        assert!(
            table.stop(&name, Generation(2), Timestamp(1)),
            "its end was reported already"
        );
        assert!(table.enter(&name, Generation(3)).is_some());
        assert!(
            table.enter(&name, Generation(1)).is_some(),
            "the service was removed and registered anew"
        );
    }

    #[test]
    fn a_stop_is_only_brought_forward() {
        let table = Table::default();
        let name = ServiceName::new("s");
        let slot = table.enter(&name, Generation(1)).unwrap();
        for (at, expected) in [(50, 50), (90, 50), (20, 20)] {
            assert!(table.stop(&name, Generation(1), Timestamp(at)));
            assert_eq!(*slot.stop.borrow(), Some(Timestamp(expected)));
        }
        assert!(!table.stop(&name, Generation(2), Timestamp(1)));
    }

    #[test]
    fn a_busy_port_is_told() {
        let table = Table::default();
        let name = ServiceName::new("s");
        let slot = table.enter(&name, Generation(1)).unwrap();
        let busy = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = busy.local_addr().unwrap().port();
        let error = table.choose_port(&slot, port).unwrap_err();
        assert!(error.contains(&port.to_string()), "{error}");
        assert_ne!(table.choose_port(&slot, 0).unwrap(), port);
    }
}
