//! Credentials of registries, as `docker login` writes them.

use std::collections::HashMap;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bollard::auth::DockerCredentials;
use serde::Deserialize;

/// The registry of names without one.
const DEFAULT_REGISTRY: &str = "https://index.docker.io/v1/";

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    auths: HashMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    auth: Option<String>,
    identitytoken: Option<String>,
}

/// What the file has for an image's registry; `None` when nothing. The error says what is wrong with the file.
pub fn credentials(file: Option<&Path>, image: &str) -> Result<Option<DockerCredentials>, String> {
    let Some(path) = file else {
        return Ok(None);
    };
    let wrong = |what: String| format!("docker_credentials: {} {what}", path.display());
    let text =
        std::fs::read_to_string(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    let config: Config =
        serde_json::from_str(&text).map_err(|_| wrong("is no docker config.json".to_owned()))?;
    let registry = registry_of(image);
    let Some(entry) = config.auths.get(registry) else {
        return Ok(None);
    };
    let pair = entry
        .auth
        .as_ref()
        .and_then(|auth| STANDARD.decode(auth).ok());
    let pair = pair.and_then(|bytes| String::from_utf8(bytes).ok());
    let (username, password) = match pair.as_deref().and_then(|pair| pair.split_once(':')) {
        Some((user, password)) => (Some(user.to_owned()), Some(password.to_owned())),
        None => (None, None),
    };
    Ok(Some(DockerCredentials {
        username,
        password,
        serveraddress: Some(registry.to_owned()),
        identitytoken: entry.identitytoken.clone(),
        ..DockerCredentials::default()
    }))
}

/// The part before the first slash, when it looks like a host.
fn registry_of(image: &str) -> &str {
    match image.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => host,
        _ => DEFAULT_REGISTRY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_those_of_the_images_registry() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let auth = STANDARD.encode("me:s3cret");
        std::fs::write(
            file.path(),
            format!(r#"{{"auths":{{"localhost:5000":{{"auth":"{auth}"}}}}}}"#),
        )
        .unwrap();
        let of = |image| credentials(Some(file.path()), image).unwrap();
        let found = of("localhost:5000/a:b").unwrap();
        assert_eq!(
            (found.username.as_deref(), found.password.as_deref()),
            (Some("me"), Some("s3cret"))
        );
        assert!(of("busybox").is_none() && of("other.example/x").is_none());
        std::fs::write(file.path(), "no json").unwrap();
        assert!(
            credentials(Some(file.path()), "busybox")
                .unwrap_err()
                .contains("config.json")
        );
    }
}
