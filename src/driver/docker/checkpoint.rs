//! The folder that the attempts of a job hand on to each other: a volume of the engine for each job. It is made with the
//! first container and removed when nobody needs it any more, which is not known here.

use bollard::models::{Mount, MountType, MountVolumeOptions};
use bollard::query_parameters::{
    ListVolumesOptions, RemoveVolumeOptions, UploadToContainerOptions,
};
use bytes::Bytes;
use uuid::Uuid;

use super::engine::{CHANGE, Docker, DockerError, LOOK};
use super::recipe::LABEL_LEDGER;
use crate::domain::ids::{PlaneId, RunId};

/// Whose a volume is.
const LABEL_PLANE: &str = "io.rungate.plane";
const LABEL_RUN: &str = "io.rungate.run";

/// Where the volume is seen inside.
const MOUNTED_AT: &str = "/rungate";
/// The folder on it. The volume's own root is root's alone, whoever the container runs as.
const FOLDER: &str = "checkpoint";

/// Where a job finds the folder.
pub(super) const CHECKPOINT_DIR: &str = "/rungate/checkpoint";

/// A checkpoint folder that the engine keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The volume's name.
    pub name: String,
    pub plane: PlaneId,
    pub run: RunId,
}

/// The volume of a job as its containers get it; made when it is missing.
pub fn mount(ledger: Uuid, plane: PlaneId, run: RunId) -> Mount {
    let ledger = ledger.hyphenated().to_string();
    let labels = [
        (LABEL_LEDGER, ledger.clone()),
        (LABEL_PLANE, plane.0.to_string()),
        (LABEL_RUN, run.to_string()),
    ];
    let labels = labels.map(|(label, value)| (label.to_owned(), value));
    Mount {
        typ: Some(MountType::VOLUME),
        source: Some(format!("rungate-{}-{}", &ledger[..8], run.0.simple())),
        target: Some(MOUNTED_AT.to_owned()),
        volume_options: Some(MountVolumeOptions {
            no_copy: Some(true),
            labels: Some(labels.into()),
            ..MountVolumeOptions::default()
        }),
        ..Mount::default()
    }
}

/// An archive of one folder that everybody may write to.
fn archive() -> std::io::Result<Bytes> {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_mode(0o777);
    header.set_size(0);
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_data(&mut header, FOLDER, std::io::empty())?;
    archive.into_inner().map(Bytes::from)
}

impl Docker {
    /// Makes the folder on the volume of a container that is not yet started; what is in it stays.
    pub(super) async fn make_folder(&self, id: &str) -> Result<(), DockerError> {
        let archive = archive().map_err(|error| DockerError::Refused(error.to_string()))?;
        let options = UploadToContainerOptions {
            path: MOUNTED_AT.to_owned(),
            ..UploadToContainerOptions::default()
        };
        self.call("make a checkpoint folder", CHANGE, |client| async move {
            let body = bollard::body_full(archive);
            client.upload_to_container(id, Some(options), body).await
        })
        .await
    }

    /// All checkpoint folders of this ledger.
    ///
    /// # Errors
    /// The engine does not answer.
    pub async fn checkpoints(&self) -> Result<Vec<Checkpoint>, DockerError> {
        let ledger = self.inner.ledger.hyphenated();
        let label = format!("{LABEL_LEDGER}={ledger}");
        let options = ListVolumesOptions {
            filters: Some([("label".to_owned(), vec![label])].into()),
        };
        let found = self
            .call("list volumes", LOOK, |client| async move {
                client.list_volumes(Some(options)).await
            })
            .await?;
        let volumes = found.volumes.into_iter().flatten();
        let checkpoint = |volume: bollard::models::Volume| {
            Some(Checkpoint {
                plane: PlaneId(volume.labels.get(LABEL_PLANE)?.parse().ok()?),
                run: volume.labels.get(LABEL_RUN)?.parse().ok()?,
                name: volume.name,
            })
        };
        Ok(volumes.filter_map(checkpoint).collect())
    }

    /// Removes a checkpoint folder.
    ///
    /// # Errors
    /// A container still has it, or the engine does not answer.
    pub async fn remove_checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), DockerError> {
        let name = checkpoint.name.clone();
        self.call("remove a volume", CHANGE, |client| async move {
            client
                .remove_volume(&name, None::<RemoveVolumeOptions>)
                .await
        })
        .await
    }
}
