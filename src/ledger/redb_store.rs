//! The store on redb: two-phase commits that also save the allocator's state, so that opening after
//! kill -9 is as fast as after a good end. Translates redb's errors; knows nothing of records.

use std::cell::OnceCell;

use redb::{
    Database, ReadOnlyDatabase, ReadOnlyTable, ReadTransaction, ReadableDatabase,
    ReadableTableMetadata, StorageError, TableDefinition, TableError,
};

use super::error::StoreError;
use super::store::{Direction, KeyBounds, Snapshot, Store, Table, Visit, WriteSet};

type Bytes = &'static [u8];

fn definition(table: Table) -> TableDefinition<'static, Bytes, Bytes> {
    TableDefinition::new(table.name())
}

/// A redb file, open for writing or for reading only.
pub enum RedbStore {
    Writable(Database),
    ReadOnly(ReadOnlyDatabase),
}

impl Store for RedbStore {
    fn snapshot(&self) -> Result<Box<dyn Snapshot>, StoreError> {
        let transaction = match self {
            RedbStore::Writable(database) => database.begin_read(),
            RedbStore::ReadOnly(database) => database.begin_read(),
        };
        Ok(Box::new(RedbSnapshot {
            transaction: transaction.map_err(|error| other(error.into()))?,
            tables: Default::default(),
        }))
    }

    fn commit(&self, writes: WriteSet) -> Result<(), StoreError> {
        let RedbStore::Writable(database) = self else {
            return Err(StoreError::Other("the store is open for reading".into()));
        };
        let mut transaction = database.begin_write().map_err(|e| other(e.into()))?;
        // Two-phase: a client's payload must not be able to make half a commit look whole (redb,
        // docs/design.md, "Security of 1PC+C"). Quick repair implies it, and spares the walk over
        // the whole file after a crash.
        transaction.set_two_phase_commit(true);
        transaction.set_quick_repair(true);
        for (table, changes) in writes.into_tables() {
            let mut open = transaction
                .open_table(definition(table))
                .map_err(table_error)?;
            for (key, value) in changes {
                match value {
                    Some(value) => drop(open.insert(&key[..], &value[..]).map_err(storage)?),
                    None => drop(open.remove(&key[..]).map_err(storage)?),
                }
            }
        }
        transaction.commit().map_err(|error| other(error.into()))
    }
}

/// One read transaction with the tables it has opened.
struct RedbSnapshot {
    transaction: ReadTransaction,
    tables: [OnceCell<Option<ReadOnlyTable<Bytes, Bytes>>>; Table::ALL.len()],
}

impl RedbSnapshot {
    /// `None` for a table that nothing was written to yet.
    fn table(&self, table: Table) -> Result<Option<&ReadOnlyTable<Bytes, Bytes>>, StoreError> {
        let cell = &self.tables[table as usize];
        if cell.get().is_none() {
            let opened = match self.transaction.open_table(definition(table)) {
                Ok(opened) => Some(opened),
                Err(TableError::TableDoesNotExist(_)) => None,
                Err(error) => return Err(table_error(error)),
            };
            // Nobody else sets it: a snapshot belongs to one thread at a time.
            let _ = cell.set(opened);
        }
        Ok(cell.get().and_then(Option::as_ref))
    }
}

impl Snapshot for RedbSnapshot {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(open) = self.table(table)? else {
            return Ok(None);
        };
        let found = open.get(key).map_err(storage)?;
        Ok(found.map(|value| value.value().to_vec()))
    }

    fn scan(
        &self,
        table: Table,
        bounds: KeyBounds<'_>,
        direction: Direction,
        visit: &mut Visit<'_>,
    ) -> Result<(), StoreError> {
        let Some(open) = self.table(table)? else {
            return Ok(());
        };
        let mut range = open.range::<&[u8]>(bounds).map_err(storage)?;
        while let Some(entry) = match direction {
            Direction::Up => range.next(),
            Direction::Down => range.next_back(),
        } {
            let (key, value) = entry.map_err(storage)?;
            if visit(key.value(), value.value()).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn len(&self, table: Table) -> Result<u64, StoreError> {
        match self.table(table)? {
            Some(open) => open.len().map_err(storage),
            None => Ok(0),
        }
    }

    fn disk_bytes(&self, table: Table) -> Result<u64, StoreError> {
        let Some(open) = self.table(table)? else {
            return Ok(0);
        };
        let stats = open.stats().map_err(storage)?;
        Ok(stats.stored_bytes() + stats.metadata_bytes() + stats.fragmented_bytes())
    }
}

fn storage(error: StorageError) -> StoreError {
    match error {
        StorageError::Io(error) => StoreError::Io(error),
        StorageError::Corrupted(detail) => StoreError::Corrupted(detail),
        StorageError::PreviousIo => StoreError::Failed,
        error => StoreError::Other(error.to_string()),
    }
}

fn table_error(error: TableError) -> StoreError {
    match error {
        TableError::Storage(error) => storage(error),
        error => StoreError::Corrupted(error.to_string()),
    }
}

/// From redb's catch-all, which every one of its errors turns into.
fn other(error: redb::Error) -> StoreError {
    match error {
        redb::Error::Io(error) => StoreError::Io(error),
        redb::Error::Corrupted(detail) => StoreError::Corrupted(detail),
        redb::Error::PreviousIo => StoreError::Failed,
        error => StoreError::Other(error.to_string()),
    }
}
