//! The first administrator's token: made at the first start, kept in a file that only its owner reads,
//! never printed or logged.

use std::io;
use std::path::{Path, PathBuf};

use secrecy::{ExposeSecret, SecretString};

use super::token;
use crate::private_file;

/// Shortest token an operator may put there by hand.
const MIN_TOKEN_BYTES: usize = 16;

/// Where the token lies, and what it is.
pub struct Bootstrap {
    pub token: SecretString,
    pub path: PathBuf,
}

/// Why there is no token to go by.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    #[error("cannot read or write the administrator's token {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{path} holds no token (at least {MIN_TOKEN_BYTES} visible characters on one line); \
         remove it to get a new one at the next start"
    )]
    Malformed { path: PathBuf },
}

/// Where the token lies.
pub fn path(data_dir: &Path) -> PathBuf {
    data_dir.join("auth").join("bootstrap-admin-token")
}

/// Whether [`load_or_create`] will have nothing to complain of in what is there; changes nothing.
///
/// # Errors
/// As `load_or_create`.
pub fn check(data_dir: &Path) -> Result<(), BootstrapError> {
    let there = path(data_dir);
    match std::fs::symlink_metadata(there) {
        Ok(_) => load_or_create(data_dir).map(drop),
        // A missing one will be made; any other trouble is the ledger's to tell, which lies beside it.
        Err(_) => Ok(()),
    }
}

/// Reads `<data>/auth/bootstrap-admin-token`, making it (0600, its folder 0700) when there is none.
pub fn load_or_create(data_dir: &Path) -> Result<Bootstrap, BootstrapError> {
    let path = path(data_dir);
    let failed = |source| BootstrapError::Io {
        path: path.clone(),
        source,
    };
    let Some(text) = private_file::read(&path).map_err(failed)? else {
        return replace(data_dir);
    };
    let token = SecretString::from(text.trim());
    let bytes = token.expose_secret().as_bytes();
    let sound = bytes.len() >= MIN_TOKEN_BYTES && bytes.iter().all(u8::is_ascii_graphic);
    if !sound {
        return Err(BootstrapError::Malformed { path });
    }
    Ok(Bootstrap { token, path })
}

/// Makes a new token in place of whatever was there. A running gateway goes on with the old one.
pub fn replace(data_dir: &Path) -> Result<Bootstrap, BootstrapError> {
    let path = path(data_dir);
    let token = SecretString::from(token::generate("admin"));
    let line = SecretString::from(format!("{}\n", token.expose_secret()));
    private_file::write(&path, line.expose_secret().as_bytes()).map_err(|source| {
        BootstrapError::Io {
            path: path.clone(),
            source,
        }
    })?;
    Ok(Bootstrap { token, path })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_token_is_made_once_and_only_its_owner_reads_it() {
        let data = tempfile::tempdir().unwrap();
        let first = load_or_create(data.path()).unwrap();
        assert!(token::is_well_formed(first.token.expose_secret(), "admin"));
        let mode = fs::metadata(&first.path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let folder = fs::metadata(data.path().join("auth")).unwrap();
        assert_eq!(folder.permissions().mode() & 0o777, 0o700);
        let second = load_or_create(data.path()).unwrap();
        let text = |bootstrap: &Bootstrap| bootstrap.token.expose_secret().to_owned();
        assert_eq!(text(&first), text(&second));
        assert_ne!(text(&replace(data.path()).unwrap()), text(&first));
    }

    #[test]
    fn an_empty_file_is_no_token() {
        let data = tempfile::tempdir().unwrap();
        fs::create_dir(data.path().join("auth")).unwrap();
        fs::write(data.path().join("auth/bootstrap-admin-token"), "\n").unwrap();
        let error = load_or_create(data.path()).err().unwrap();
        assert!(matches!(error, BootstrapError::Malformed { .. }));
    }
}
