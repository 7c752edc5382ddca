//! Transport: the flags of `serve` that say what the lanes to the peer run over.

use clap::{Args, ValueEnum};
use rdma_fallback::rdma::{Choice, RdmaOptions};

use crate::failure::Failure;

/// See the module.
#[derive(Args)]
pub struct TransportArgs {
    /// What the lanes to the peer run over; the nodes agree on it anew with every session.
    #[arg(long, value_enum, default_value_t = TransportFlag::Auto)]
    transport: TransportFlag,
    /// The RDMA device, as `rdma link` shows it. Default: the one on the way to the peer.
    #[arg(long, value_name = "NAME")]
    rdma_device: Option<String>,
    /// Index of the RDMA device's own address (GID); needs --rdma-device. Default: the address of the TCP connection.
    #[arg(long, value_name = "INDEX", requires = "rdma_device")]
    rdma_gid_index: Option<u32>,
    /// Most payload bytes of an RDMA packet: 256, 512, 1024, 2048 or 4096. Default: what the network allows.
    #[arg(long, value_name = "BYTES")]
    rdma_mtu: Option<u32>,
    /// RDMA requests to send that a lane may have under way (count), 64 to 16384. More hide the latency of the wire.
    #[arg(long, value_name = "COUNT", default_value_t = RdmaOptions::default().send_requests)]
    rdma_send_queue: u32,
    /// RDMA receives that wait on a lane (count), 16 to 4096, each with 8 KiB of locked memory.
    #[arg(long, value_name = "COUNT", default_value_t = RdmaOptions::default().receive_requests)]
    rdma_receive_queue: u32,
    /// Longest message that goes inside its RDMA request (bytes), 0 to 1024. A card may allow less.
    #[arg(long, value_name = "BYTES", default_value_t = RdmaOptions::default().inline_bytes)]
    rdma_inline: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TransportFlag {
    /// RDMA where both nodes can, else TCP, with the reason in the log
    Auto,
    /// RDMA, or no session
    Rdma,
    /// TCP
    Tcp,
}

impl TransportArgs {
    /// The flags in the form that the node takes.
    ///
    /// # Errors
    /// If a number is not possible.
    pub fn options(self) -> Result<(Choice, RdmaOptions), Failure> {
        let choice = match self.transport {
            TransportFlag::Auto => Choice::Auto,
            TransportFlag::Rdma => Choice::Rdma,
            TransportFlag::Tcp => Choice::Tcp,
        };
        let options = RdmaOptions {
            device: self.rdma_device,
            gid_index: self.rdma_gid_index,
            mtu_bytes: self.rdma_mtu,
            send_requests: self.rdma_send_queue,
            receive_requests: self.rdma_receive_queue,
            inline_bytes: self.rdma_inline,
            ..RdmaOptions::default()
        };
        options.check().map_err(|fault| {
            Failure::usage(format!("{fault}: change the --rdma-* flag that it is about"))
        })?;
        Ok((choice, options))
    }
}
