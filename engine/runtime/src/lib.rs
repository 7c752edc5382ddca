//! The real shell: pinned threads, rings, io_uring, buffers, frontends.
pub mod buffers;
pub mod device;
pub mod gate;
pub mod options;
pub mod ring;
pub mod uring;
pub mod wake;
