//! NVIDIA's Multi-Process Service, by which several services share one GPU: what it is told of an instance.

use crate::domain::spec::Grant;

/// Its share of the threads, and its grant as the limit of its memory on each GPU, which are counted as it sees them. None
/// where it is not asked for. Source: NVIDIA, Multi-Process Service, "Environment Variables".
pub fn variables(grants: &[Grant], percent: Option<u8>) -> Vec<(String, String)> {
    let Some(percent) = percent.filter(|_| !grants.is_empty()) else {
        return Vec::new();
    };
    let limit = |(index, grant): (usize, &Grant)| format!("{index}={}M", grant.mib);
    let limits: Vec<String> = grants.iter().enumerate().map(limit).collect();
    vec![
        (
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE".to_owned(),
            percent.to_string(),
        ),
        (
            "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT".to_owned(),
            limits.join(","),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn under_mps_the_grant_is_the_limit() {
        let grants = [("A", 4_096), ("B", 512)].map(|(gpu, mib)| Grant {
            gpu: gpu.into(),
            mib,
        });
        let told = variables(&grants, Some(30));
        assert_eq!(told[0].1, "30");
        assert_eq!(told[1].1, "0=4096M,1=512M");
        assert_eq!(variables(&[], Some(30)), []);
    }
}
