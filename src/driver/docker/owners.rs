//! Which containers instances live in: what is measured of processes in them is attributed by it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use smol_str::SmolStr;

use crate::domain::ids::{Generation, ServiceName};

type Owner = (ServiceName, Generation);

/// Cloneable; all clones know the same.
#[derive(Clone, Debug, Default)]
pub struct ContainerOwners {
    owners: Arc<Mutex<HashMap<SmolStr, Owner>>>,
}

impl ContainerOwners {
    /// The instance that lives in a container, by the engine's id.
    pub fn of(&self, container: &str) -> Option<Owner> {
        self.lock().get(container).cloned()
    }

    /// The container that an instance lives in.
    pub fn container_of(&self, service: &ServiceName, generation: Generation) -> Option<SmolStr> {
        let owners = self.lock();
        let mut occupied = owners.iter();
        let found = occupied.find(|(_, owner)| owner.0 == *service && owner.1 == generation)?;
        Some(found.0.clone())
    }

    /// Known until the answer is dropped.
    pub fn enter(&self, container: SmolStr, owner: Owner) -> Occupied {
        self.lock().insert(container.clone(), owner);
        Occupied {
            owners: self.clone(),
            container,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SmolStr, Owner>> {
        // Nothing panics while it is held.
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An instance lives in the container for as long as this does.
#[derive(Debug)]
pub struct Occupied {
    owners: ContainerOwners,
    container: SmolStr,
}

impl Drop for Occupied {
    fn drop(&mut self) {
        self.owners.lock().remove(&self.container);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_has_an_owner_while_an_instance_lives_in_it() {
        let owners = ContainerOwners::default();
        let owner = (ServiceName::from("s"), Generation(2));
        let occupied = owners.clone().enter("c1".into(), owner.clone());
        assert_eq!(owners.of("c1"), Some(owner.clone()));
        assert_eq!(owners.container_of(&owner.0, owner.1), Some("c1".into()));
        assert_eq!(owners.container_of(&owner.0, Generation(1)), None);
        drop(occupied);
        assert_eq!(owners.of("c1"), None);
    }
}
