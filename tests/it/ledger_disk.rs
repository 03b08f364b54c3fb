//! Crashes on a simulated disk: writes that were not synced may be lost, or torn at sectors, in any
//! combination; a sync may fail; the disk may be full. After each: what was acknowledged is there, what
//! is there is a prefix of the batches, the chain holds and the projections follow from it.

use std::io;
use std::sync::{Arc, Mutex};

use redb::StorageBackend;
use rungate::ledger::{CommitError, Hash, Ledger, OpenError, OpenOptions};

use crate::ledger_world::{Rng, write_trace};

const SECTOR: usize = 512;
const BATCHES: usize = 30;

/// Something that was done to the disk, in order.
#[derive(Clone, Debug)]
enum Op {
    Write(u64, Arc<[u8]>),
    SetLen(u64),
    Sync,
    /// The ledger was open for the first time: only now does its file get its name (`open::create`), so
    /// that what a crash before leaves is thrown away.
    Created,
    /// The ledger said that this tail is durable.
    Acknowledged(u64),
}

#[derive(Debug, Default)]
struct Disk {
    content: Vec<u8>,
    /// As it is when everything synced and nothing else survives.
    synced: Vec<u8>,
    log: Vec<Op>,
    syncs: u64,
    fail_sync: Option<u64>,
    capacity: Option<u64>,
}

#[derive(Clone, Debug, Default)]
struct SimulatedDisk(Arc<Mutex<Disk>>);

impl SimulatedDisk {
    fn holding(content: Vec<u8>) -> Self {
        let synced = content.clone();
        SimulatedDisk(Arc::new(Mutex::new(Disk {
            content,
            synced,
            ..Disk::default()
        })))
    }

    fn with<T>(&self, f: impl FnOnce(&mut Disk) -> T) -> T {
        f(&mut self.0.lock().unwrap())
    }

    fn full() -> io::Error {
        io::Error::from(io::ErrorKind::StorageFull)
    }
}

impl StorageBackend for SimulatedDisk {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.with(|disk| disk.content.len() as u64))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        self.with(|disk| {
            let start = usize::try_from(offset).unwrap();
            let part = disk.content.get(start..start + out.len());
            out.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        self.with(|disk| {
            if disk.capacity.is_some_and(|capacity| len > capacity) {
                return Err(Self::full());
            }
            apply(&mut disk.content, &Op::SetLen(len));
            disk.log.push(Op::SetLen(len));
            Ok(())
        })
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        self.with(|disk| {
            disk.syncs += 1;
            if disk.fail_sync == Some(disk.syncs) {
                // As Linux does it: the pages are dropped, and the next sync says nothing of them.
                disk.content = disk.synced.clone();
                return Err(io::Error::other("simulated: the sync failed"));
            }
            disk.synced = disk.content.clone();
            disk.log.push(Op::Sync);
            Ok(())
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.with(|disk| {
            let end = offset + data.len() as u64;
            if disk.capacity.is_some_and(|capacity| end > capacity) {
                return Err(Self::full());
            }
            let op = Op::Write(offset, data.into());
            apply(&mut disk.content, &op);
            disk.log.push(op);
            Ok(())
        })
    }
}

fn apply(content: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write(offset, data) => {
            let start = usize::try_from(*offset).unwrap();
            if content.len() < start + data.len() {
                content.resize(start + data.len(), 0);
            }
            content[start..start + data.len()].copy_from_slice(data);
        }
        Op::SetLen(len) => content.resize(usize::try_from(*len).unwrap(), 0),
        Op::Sync | Op::Created | Op::Acknowledged(_) => {}
    }
}

/// What a power loss leaves of writes that were not synced: any subset, each torn at sectors.
fn tear(content: &mut Vec<u8>, pending: &[Op], rng: &mut Rng) {
    let survive_percent = [0, 50, 90, 100][usize::try_from(rng.below(4)).unwrap()];
    for op in pending {
        match op {
            Op::Write(offset, data) => {
                let mut at = 0;
                while at < data.len() {
                    let position = usize::try_from(*offset).unwrap() + at;
                    let end = (at + SECTOR - position % SECTOR).min(data.len());
                    if rng.chance(survive_percent) {
                        let part = Op::Write(position as u64, data[at..end].into());
                        apply(content, &part);
                    }
                    at = end;
                }
            }
            op if rng.chance(survive_percent) => apply(content, op),
            _ => {}
        }
    }
}

/// Opens what a crash left, and checks it against what was acknowledged and what was ever written.
fn check(disk: SimulatedDisk, acknowledged: u64, tails: &[(u64, Hash)], what: &str) {
    let opened = Ledger::open_backend(disk, &OpenOptions::default());
    let (ledger, mut writer) = opened.unwrap_or_else(|error| panic!("{what}: {error}"));
    let tail = ledger.tail();
    assert!(
        tail >= acknowledged,
        "{what}: {acknowledged} was acknowledged, {tail} is there"
    );
    let expected = tails.iter().find(|(seq, _)| *seq == tail);
    let (_, hash) = expected.unwrap_or_else(|| panic!("{what}: {tail} ends no batch"));
    assert_eq!(writer.tail_hash(), *hash, "{what}");
    let verified = ledger.verify(&mut |_| {});
    let verified = verified.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(verified.records, tail, "{what}");
    write_trace(&mut writer, 99, 1, |_, _| {}).unwrap_or_else(|error| panic!("{what}: {error}"));
}

/// The log of a whole life: made, some batches, closed.
fn recorded(seed: u64, batches: usize) -> (Vec<Op>, Vec<(u64, Hash)>) {
    let disk = SimulatedDisk::default();
    let mut tails = vec![(0, [0; 32])];
    {
        let (_ledger, mut writer) =
            Ledger::open_backend(disk.clone(), &OpenOptions::default()).unwrap();
        disk.with(|disk| disk.log.push(Op::Created));
        let acknowledge = |tail, hash| {
            disk.with(|disk| disk.log.push(Op::Acknowledged(tail)));
            tails.push((tail, hash));
        };
        write_trace(&mut writer, seed, batches, acknowledge).unwrap();
    }
    (disk.with(|disk| disk.log.clone()), tails)
}

#[test]
fn a_crash_at_every_operation_loses_nothing_acknowledged() {
    let seed = std::env::var("LEDGER_SEED").map_or(1, |seed| seed.parse().unwrap());
    let (log, tails) = recorded(seed, BATCHES);
    let mut rng = Rng(seed);
    let (mut synced, mut since, mut acknowledged) = (Vec::new(), 0, 0);
    let created = log.iter().position(|op| matches!(op, Op::Created)).unwrap();
    for at in 0..log.len() {
        let what = format!("LEDGER_SEED={seed}, crash before operation {at}");
        let mut image = synced.clone();
        tear(&mut image, &log[since..at], &mut rng);
        if at > created {
            let disk = SimulatedDisk::holding(image.clone());
            check(disk, acknowledged, &tails, &what);
            if at % 7 == 0 {
                crash_in_recovery(image, acknowledged, &tails, &mut rng, &what);
            }
        }
        match &log[at] {
            Op::Sync => {
                for op in &log[since..at] {
                    apply(&mut synced, op);
                }
                since = at + 1;
            }
            Op::Acknowledged(tail) => acknowledged = *tail,
            _ => {}
        }
    }
    assert_eq!(acknowledged, tails.last().unwrap().0);
}

/// Crashes again while the first crash is being mended, at a few places, and then checks.
fn crash_in_recovery(
    image: Vec<u8>,
    acknowledged: u64,
    tails: &[(u64, Hash)],
    rng: &mut Rng,
    what: &str,
) {
    let disk = SimulatedDisk::holding(image.clone());
    drop(Ledger::open_backend(disk.clone(), &OpenOptions::default()).unwrap());
    let log = disk.with(|disk| disk.log.clone());
    for _ in 0..3 {
        let at = usize::try_from(rng.below(log.len() as u64 + 1)).unwrap();
        let synced = log[..at]
            .iter()
            .rposition(|op| matches!(op, Op::Sync))
            .map_or(0, |n| n + 1);
        let mut torn = image.clone();
        for op in &log[..synced] {
            apply(&mut torn, op);
        }
        tear(&mut torn, &log[synced..at], rng);
        let what = format!("{what}, again before operation {at} of the recovery");
        check(SimulatedDisk::holding(torn), acknowledged, tails, &what);
    }
}

#[test]
fn a_failed_sync_poisons_the_writer_and_loses_nothing_acknowledged() {
    let seed = 2;
    let (log, tails) = recorded(seed, BATCHES);
    let syncs = log.iter().filter(|op| matches!(op, Op::Sync)).count() as u64;
    for fail in 1..=syncs {
        let disk = SimulatedDisk::default();
        disk.with(|disk| disk.fail_sync = Some(fail));
        let mut acknowledged = 0;
        let Ok((ledger, mut writer)) = Ledger::open_backend(disk.clone(), &OpenOptions::default())
        else {
            // It failed before the file had its name.
            continue;
        };
        let written = write_trace(&mut writer, seed, BATCHES, |tail, _| acknowledged = tail);
        if written.is_err() {
            let again = writer.begin().map(drop);
            assert!(matches!(again, Err(CommitError::Poisoned)), "sync {fail}");
        }
        drop((ledger, writer));
        let image = disk.with(|disk| disk.synced.clone());
        let what = format!("seed {seed}, sync {fail} failed");
        check(SimulatedDisk::holding(image), acknowledged, &tails, &what);
    }
}

#[test]
fn a_full_disk_is_told_and_loses_nothing_acknowledged() {
    let (seed, batches) = (3, 400);
    let (log, tails) = recorded(seed, batches);
    let mut lengths: Vec<u64> = log
        .iter()
        .filter_map(|op| match op {
            Op::SetLen(len) => Some(*len),
            _ => None,
        })
        .collect();
    lengths.sort_unstable();
    lengths.dedup();
    let mut stopped = 0;
    for capacity in lengths.into_iter().map(|len| len - 1) {
        let disk = SimulatedDisk::default();
        disk.with(|disk| disk.capacity = Some(capacity));
        let mut acknowledged = 0;
        let opened = Ledger::open_backend(disk.clone(), &OpenOptions::default());
        let (ledger, mut writer) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                assert!(matches!(error, OpenError::DiskFull { .. }), "{error:?}");
                continue;
            }
        };
        let written = write_trace(&mut writer, seed, batches, |tail, _| acknowledged = tail);
        let told = matches!(written, Err(CommitError::DiskFull(_)) | Ok(()));
        assert!(told, "{written:?}");
        stopped += u64::from(written.is_err());
        drop((ledger, writer));
        let image = disk.with(|disk| disk.content.clone());
        let what = format!("seed {seed}, capacity {capacity}");
        check(SimulatedDisk::holding(image), acknowledged, &tails, &what);
    }
    assert!(stopped > 0, "no capacity stopped it in mid-work");
}
