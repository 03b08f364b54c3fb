//! Callbacks and notifications that are owed: when each is due, and whose is sent next. One task keeps all of a kind, so
//! that one which is due tomorrow costs its entry here and nothing else. They go to strangers, who may be slow: no tenant
//! has more than its part of those that are sent at the same time.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};

use smol_str::SmolStr;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::Inner;
use crate::clock::now;
use crate::domain::time::Timestamp;
use crate::driver::until;

/// Something to send, to a receiver that a tenant chose.
pub(super) trait Due: Send + 'static {
    /// What it is, for the name of its task.
    const NAME: &'static str;

    fn tenant(&self) -> &SmolStr;

    fn not_before(&self) -> Timestamp;

    /// Sends it and reports what came of it.
    fn send(self, inner: Arc<Inner>) -> impl Future<Output = ()> + Send;
}

/// Those of a kind sent at the same time: each holds its body.
const AT_ONCE: usize = 64;

/// Those of one tenant: three that call nowhere leave room for the others.
const AT_ONCE_OF_TENANT: usize = 16;

/// What is owed and not sent yet.
struct Owed<T> {
    /// Not due yet; the number tells apart what is due at the same time.
    later: BTreeMap<(Timestamp, u64), T>,
    taken_in: u64,
    /// Due, by tenant.
    due: BTreeMap<SmolStr, VecDeque<T>>,
    /// How many are being sent, by tenant.
    sending: BTreeMap<SmolStr, usize>,
}

impl<T> Default for Owed<T> {
    fn default() -> Self {
        Owed {
            later: BTreeMap::new(),
            taken_in: 0,
            due: BTreeMap::new(),
            sending: BTreeMap::new(),
        }
    }
}

impl<T: Due> Owed<T> {
    fn put(&mut self, asked: T) {
        self.taken_in += 1;
        self.later
            .insert((asked.not_before(), self.taken_in), asked);
    }

    /// When the next one will be due.
    fn next_at(&self) -> Option<Timestamp> {
        self.later.keys().next().map(|(at, _)| *at)
    }

    /// Notes what is due by now.
    fn mature(&mut self, now: Timestamp) {
        while let Some(entry) = self
            .later
            .first_entry()
            .filter(|entry| entry.key().0 <= now)
        {
            let asked = entry.remove();
            let of_tenant = self.due.entry(asked.tenant().clone()).or_default();
            of_tenant.push_back(asked);
        }
    }

    /// The next one to be sent, of the tenant that sends the fewest.
    fn take(&mut self) -> Option<T> {
        let sending = |tenant: &SmolStr| self.sending.get(tenant).copied().unwrap_or_default();
        if self.sending.values().sum::<usize>() >= AT_ONCE {
            return None;
        }
        let tenants = self.due.keys().map(|tenant| (sending(tenant), tenant));
        let (_, tenant) = tenants.filter(|(n, _)| *n < AT_ONCE_OF_TENANT).min()?;
        let tenant = tenant.clone();
        let waiting = self.due.get_mut(&tenant)?;
        let asked = waiting.pop_front();
        if waiting.is_empty() {
            self.due.remove(&tenant);
        }
        *self.sending.entry(tenant).or_default() += 1;
        asked
    }

    /// One of the tenant's has been sent.
    fn sent(&mut self, tenant: &SmolStr) {
        if let Some(count) = self.sending.get_mut(tenant) {
            *count -= 1;
            if *count == 0 {
                self.sending.remove(tenant);
            }
        }
    }
}

/// Tells that one has been sent, whatever came of it.
struct Sending {
    tenant: SmolStr,
    sent: UnboundedSender<SmolStr>,
}

impl Drop for Sending {
    fn drop(&mut self) {
        // Nobody counts any more when the gateway stops.
        let _ = self.sent.send(self.tenant.clone());
    }
}

/// Sends what is asked for when it is due, until nobody can ask any more.
pub(super) async fn keep<T: Due>(inner: Weak<Inner>, mut asked: UnboundedReceiver<T>) {
    let mut owed = Owed::<T>::default();
    let (sent, mut ended) = unbounded_channel();
    loop {
        let next_at = owed.next_at();
        tokio::select! {
            new = asked.recv() => match new {
                Some(new) => owed.put(new),
                None => return,
            },
            Some(tenant) = ended.recv() => owed.sent(&tenant),
            () = wait(next_at) => {}
        }
        owed.mature(now());
        while let Some(asked) = owed.take() {
            let Some(inner) = inner.upgrade() else { return };
            let sending = Sending {
                tenant: asked.tenant().clone(),
                sent: sent.clone(),
            };
            let tasks = inner.tasks.clone();
            tasks.spawn(T::NAME, async move {
                let _sending = sending;
                asked.send(inner).await;
            });
        }
    }
}

async fn wait(next_at: Option<Timestamp>) {
    match next_at {
        Some(at) => tokio::time::sleep(until(at)).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::{PlaneId, RunId};
    use crate::executor::callback::Try;
    use uuid::Uuid;

    fn of(tenant: &str, at: i64) -> Try {
        Try {
            plane: PlaneId(1),
            tenant: tenant.into(),
            run: RunId(Uuid::nil()),
            number: 1,
            url: "http://example.org/".into(),
            not_before: Timestamp(at),
        }
    }

    fn taken(owed: &mut Owed<Try>) -> String {
        let taken = std::iter::from_fn(|| owed.take());
        taken.map(|asked| asked.tenant.to_string()).collect()
    }

    #[test]
    fn a_tenant_whose_callbacks_hang_leaves_room_for_the_others() {
        let mut owed = Owed::<Try>::default();
        for _ in 0..100 {
            owed.put(of("a", 0));
        }
        owed.put(of("b", 5));
        owed.mature(Timestamp(0));
        assert_eq!(taken(&mut owed), "a".repeat(16));
        assert_eq!(owed.next_at(), Some(Timestamp(5)));
        owed.mature(Timestamp(4));
        assert_eq!(taken(&mut owed), "");
        owed.mature(Timestamp(5));
        assert_eq!(taken(&mut owed), "b");
        owed.sent(&"a".into());
        assert_eq!(taken(&mut owed), "a");
    }

    #[test]
    fn all_tenants_together_have_their_bound_and_the_fewest_go_first() {
        let mut owed = Owed::<Try>::default();
        for tenant in ["a", "b", "c", "d", "e"] {
            for _ in 0..20 {
                owed.put(of(tenant, 0));
            }
        }
        owed.mature(Timestamp(0));
        let all = taken(&mut owed);
        assert_eq!((all.len(), &all[..6]), (64, "abcdea"));
        assert!(all.matches('e').count() >= 12, "{all}");
        owed.sent(&"d".into());
        owed.sent(&"d".into());
        owed.sent(&"e".into());
        assert_eq!(taken(&mut owed), "ded");
    }
}
