//! The access tokens of tenants' ntfy topics: each in a file that only the gateway's user reads, with the server that it
//! is for, so that it is shown to no other.

use std::io;
use std::path::{Path, PathBuf};

use secrecy::{ExposeSecret, SecretString};

use crate::private_file;

/// The folder of them. Cloneable: it holds nothing else.
#[derive(Clone, Debug)]
pub struct NtfyTokens {
    folder: PathBuf,
}

impl NtfyTokens {
    /// In `<data>/auth/ntfy/`.
    pub fn new(data_dir: &Path) -> NtfyTokens {
        let folder = data_dir.join("auth").join("ntfy");
        NtfyTokens { folder }
    }

    /// Tenants' ids are sanitised: none has a slash, and with a word before it none is a folder's own name.
    fn path(&self, tenant: &str) -> PathBuf {
        self.folder.join(format!("token-{tenant}"))
    }

    /// The token for a tenant's topics at this server, if one was given.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn get(&self, tenant: &str, url: &str) -> io::Result<Option<SecretString>> {
        let text = private_file::read(&self.path(tenant))?;
        let Some(text) = text.map(SecretString::from) else {
            return Ok(None);
        };
        let lines = text.expose_secret().split_once('\n');
        let token = lines.filter(|(of, _)| *of == url);
        Ok(token.map(|(_, token)| SecretString::from(token.trim_end())))
    }

    /// Keeps a token, in the place of an earlier one.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put(&self, tenant: &str, url: &str, token: &SecretString) -> io::Result<()> {
        let text = SecretString::from(format!("{url}\n{}\n", token.expose_secret()));
        private_file::write(&self.path(tenant), text.expose_secret().as_bytes())
    }

    /// Forgets it.
    ///
    /// # Errors
    /// The file is there and cannot be removed.
    pub fn remove(&self, tenant: &str) -> io::Result<()> {
        match std::fs::remove_file(self.path(tenant)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_token_is_for_its_tenant_and_its_server_only() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = NtfyTokens::new(dir.path());
        let of = |tenant: &str, url: &str| {
            let token = tokens.get(tenant, url).unwrap();
            token.map(|token| token.expose_secret().to_owned())
        };
        assert_eq!(of("acme", "https://a"), None);
        let secret = SecretString::from("tk_1");
        tokens.put("acme", "https://a", &secret).unwrap();
        assert_eq!(of("acme", "https://a").as_deref(), Some("tk_1"));
        assert_eq!(of("acme", "https://b"), None);
        assert_eq!(of("globex", "https://a"), None);
        let path = dir.path().join("auth/ntfy/token-acme");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        tokens.remove("acme").unwrap();
        tokens.remove("acme").unwrap();
        assert_eq!(of("acme", "https://a"), None);
    }
}
