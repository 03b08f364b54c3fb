//! Services in real containers, on the engine of this machine. `tests/run` installs and starts one, and makes the images
//! (`tests/docker/images`); without them these tests fail.

mod chaos;
mod contract;
mod daemon;
mod disk;
mod engine;
mod faults;
mod gpus;
mod jobs;
mod output;
mod own;
mod proxy;
mod pulling;
mod refusals;
mod remote;
mod services;
