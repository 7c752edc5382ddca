//! The handshake: from the greeting to the agreed [`Terms`].
//!
//! Invariants: an option is looked at only when all of its data is there; one longer than [`OPTION_BYTES_MAX`] is
//! skipped; every option is answered once, except an export name, whose answer begins the transmission.

use super::command::Terms;
use super::host::{Export, Host};
use super::limits::{NAME_BYTES_MAX, OPTION_BYTES_MAX, OUTPUT_BYTES_MAX, PAYLOAD_BYTES_MAX};
use super::protocol::*;
use super::session::{NbdSession, Phase, Progress};

use twinpoint_core::units::{BLOCK_BYTES, SECTOR_BYTES};

/// What was said so far.
#[derive(Default)]
pub(super) struct Negotiation {
    no_zeroes: bool,
    structured: bool,
    /// The export for which the metadata context was selected.
    context_of: Option<String>,
    /// Bytes of a too long option still to skip.
    skip: usize,
}

/// An option was malformed.
struct Malformed;

/// Export name and what the client wants to know.
struct InfoQuery<'a> {
    name: &'a str,
    wants_name: bool,
}

impl NbdSession {
    /// The first thing on a connection.
    pub(super) fn greet(&mut self) {
        let batch = self.output.replies();
        batch.put(&GREETING_MAGIC.to_be_bytes());
        batch.put(&OPTION_MAGIC.to_be_bytes());
        batch.put(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    }

    /// Takes the client's answer to the greeting.
    pub(super) fn take_client_flags(&mut self) -> Progress {
        let Some(bytes) = self.input.peek::<4>() else { return Progress::NeedsBytes };
        let flags = u32::from_be_bytes(*bytes);
        self.input.consume(4);
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return self.end();
        }
        self.negotiation.no_zeroes = flags & u32::from(NO_ZEROES) != 0;
        self.phase = Phase::Options;
        Progress::Went
    }

    /// Takes the next option.
    pub(super) fn take_option(&mut self, host: &mut impl Host) -> Progress {
        if self.negotiation.skip > 0 {
            let count = self.negotiation.skip.min(self.input.unread().len());
            self.negotiation.skip -= count;
            self.input.consume(count);
            return if count > 0 { Progress::Went } else { Progress::NeedsBytes };
        }
        if self.output.waiting_bytes() > OUTPUT_BYTES_MAX {
            return Progress::Stalled;
        }
        let Some(bytes) = self.input.peek::<OPTION_HEADER_BYTES>() else {
            return Progress::NeedsBytes;
        };
        let Some(OptionHeader { option, length }) = OptionHeader::parse(bytes) else {
            return self.end();
        };
        let length = length as usize;
        if length > OPTION_BYTES_MAX {
            return self.skip_option(option, length);
        }
        let whole = OPTION_HEADER_BYTES + length;
        let Some(data) = self.input.unread().get(OPTION_HEADER_BYTES..whole) else {
            return Progress::NeedsBytes;
        };
        let data = data.to_vec();
        self.input.consume(whole);
        self.answer_option(option, &data, host)
    }

    fn skip_option(&mut self, option: u32, length: usize) -> Progress {
        if option == OPTION_EXPORT_NAME {
            return self.end();
        }
        self.input.consume(OPTION_HEADER_BYTES);
        self.negotiation.skip = length;
        self.reply_option(option, REPLY_ERROR_TOO_BIG, &[]);
        Progress::Went
    }

    fn answer_option(&mut self, option: u32, data: &[u8], host: &mut impl Host) -> Progress {
        if option == OPTION_EXPORT_NAME {
            return self.answer_export_name(data, host);
        }
        if option == OPTION_ABORT {
            self.reply_option(option, REPLY_ACK, &[]);
            return self.end();
        }
        if self.shutting_down {
            self.reply_option(option, REPLY_ERROR_SHUTDOWN, &[]);
            return Progress::Went;
        }
        let result = match option {
            OPTION_LIST => self.answer_list(data, host),
            OPTION_INFO | OPTION_GO => self.answer_info(option, data, host),
            OPTION_STRUCTURED_REPLY => self.answer_structured_reply(data),
            OPTION_LIST_META_CONTEXT | OPTION_SET_META_CONTEXT => {
                self.answer_context(option, data, host)
            }
            _ => {
                self.reply_option(option, REPLY_ERROR_UNSUPPORTED, &[]);
                Ok(())
            }
        };
        if let Err(Malformed) = result {
            self.reply_option(option, REPLY_ERROR_INVALID, &[]);
        }
        Progress::Went
    }

    /// The old way to begin the transmission, which knows no errors.
    fn answer_export_name(&mut self, name: &[u8], host: &mut impl Host) -> Progress {
        let name = str::from_utf8(name).ok().filter(|name| name.len() <= NAME_BYTES_MAX);
        let export = name.filter(|_| !self.shutting_down).and_then(|name| host.open_export(name));
        let (Some(name), Some(export)) = (name, export) else { return self.end() };
        let terms = self.terms_for(name, export);
        let batch = self.output.replies();
        batch.put(&export.size_bytes.to_be_bytes());
        batch.put(&terms.flags().to_be_bytes());
        if !self.negotiation.no_zeroes {
            batch.put(&[0; 124]);
        }
        self.begin_transmission(terms);
        Progress::Went
    }

    fn answer_list(&mut self, data: &[u8], host: &mut impl Host) -> Result<(), Malformed> {
        if !data.is_empty() {
            return Err(Malformed);
        }
        for name in host.list_exports() {
            let length = u32::try_from(name.len()).expect("names are short");
            self.reply_option(OPTION_LIST, REPLY_SERVER, &[&length.to_be_bytes(), name.as_bytes()]);
        }
        self.reply_option(OPTION_LIST, REPLY_ACK, &[]);
        Ok(())
    }

    fn answer_info(
        &mut self,
        option: u32,
        data: &[u8],
        host: &mut impl Host,
    ) -> Result<(), Malformed> {
        let query = InfoQuery::parse(data).ok_or(Malformed)?;
        let Some(export) = host.open_export(query.name) else {
            self.reply_option(option, REPLY_ERROR_UNKNOWN, &[]);
            return Ok(());
        };
        let terms = self.terms_for(query.name, export);
        let size = export.size_bytes.to_be_bytes();
        let flags = terms.flags().to_be_bytes();
        self.reply_option(option, REPLY_INFO, &[&INFO_EXPORT.to_be_bytes(), &size, &flags]);
        if query.wants_name {
            let name = query.name.as_bytes();
            self.reply_option(option, REPLY_INFO, &[&INFO_NAME.to_be_bytes(), name]);
        }
        let sizes =
            [SECTOR_BYTES as u32, BLOCK_BYTES as u32, PAYLOAD_BYTES_MAX].map(u32::to_be_bytes);
        let kind = INFO_BLOCK_SIZE.to_be_bytes();
        self.reply_option(option, REPLY_INFO, &[&kind, sizes.as_flattened()]);
        self.reply_option(option, REPLY_ACK, &[]);
        if option == OPTION_GO {
            self.begin_transmission(terms);
        } else {
            host.close_export(export.volume);
        }
        Ok(())
    }

    fn answer_structured_reply(&mut self, data: &[u8]) -> Result<(), Malformed> {
        if !data.is_empty() {
            return Err(Malformed);
        }
        self.negotiation.structured = true;
        self.reply_option(OPTION_STRUCTURED_REPLY, REPLY_ACK, &[]);
        Ok(())
    }

    fn answer_context(
        &mut self,
        option: u32,
        data: &[u8],
        host: &mut impl Host,
    ) -> Result<(), Malformed> {
        let selects = option == OPTION_SET_META_CONTEXT;
        if selects {
            self.negotiation.context_of = None;
        }
        let (name, matches) = parse_context_query(data, selects).ok_or(Malformed)?;
        if !self.negotiation.structured {
            return Err(Malformed);
        }
        let Some(export) = host.open_export(name) else {
            self.reply_option(option, REPLY_ERROR_UNKNOWN, &[]);
            return Ok(());
        };
        host.close_export(export.volume);
        if matches {
            let id = if selects { CONTEXT_ALLOCATION_ID } else { 0 };
            let context = CONTEXT_ALLOCATION.as_bytes();
            self.reply_option(option, REPLY_META_CONTEXT, &[&id.to_be_bytes(), context]);
            if selects {
                self.negotiation.context_of = Some(name.to_owned());
            }
        }
        self.reply_option(option, REPLY_ACK, &[]);
        Ok(())
    }

    fn terms_for(&self, name: &str, export: Export) -> Terms {
        let status = self.negotiation.context_of.as_deref() == Some(name);
        Terms { export, structured: self.negotiation.structured, status }
    }

    fn begin_transmission(&mut self, terms: Terms) {
        self.terms = Some(terms);
        self.phase = Phase::Transmission;
    }

    fn reply_option(&mut self, option: u32, reply: u32, data: &[&[u8]]) {
        let length = data.iter().map(|bytes| bytes.len()).sum::<usize>();
        let batch = self.output.replies();
        batch.put(&OPTION_REPLY_MAGIC.to_be_bytes());
        batch.put(&option.to_be_bytes());
        batch.put(&reply.to_be_bytes());
        batch.put(&u32::try_from(length).expect("option replies are short").to_be_bytes());
        data.iter().for_each(|bytes| batch.put(bytes));
    }
}

impl InfoQuery<'_> {
    fn parse(data: &[u8]) -> Option<InfoQuery<'_>> {
        let mut fields = Fields::new(data);
        let name = fields.string().filter(|name| name.len() <= NAME_BYTES_MAX)?;
        let mut wants_name = false;
        for _ in 0..fields.u16()? {
            wants_name |= fields.u16()? == INFO_NAME;
        }
        fields.is_empty().then_some(InfoQuery { name, wants_name })
    }
}

/// The export's name, and whether any query asks for the one context there is.
fn parse_context_query(data: &[u8], selects: bool) -> Option<(&str, bool)> {
    let mut fields = Fields::new(data);
    let name = fields.string().filter(|name| name.len() <= NAME_BYTES_MAX)?;
    let count = fields.u32()?;
    let mut matches = count == 0 && !selects;
    for _ in 0..count {
        let query = fields.string()?;
        matches |= query == CONTEXT_ALLOCATION || (query == "base:" && !selects);
    }
    fields.is_empty().then_some((name, matches))
}
