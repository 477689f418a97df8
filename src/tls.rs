//! TLS for the LISTEN connection, so that one `sslmode` means the same for it and for sqlx's pool.
//!
//! | `sslmode` | encrypted | certificate |
//! | --- | --- | --- |
//! | `disable` | no | – |
//! | `prefer` | if the server can | not looked at |
//! | `require` | yes | not looked at |
//! | `verify-ca` | yes | issued by a trusted authority, for whatever name |
//! | `verify-full` | yes | issued by a trusted authority for the host name in the URL |
//!
//! Trusted are the authorities in `sslrootcert`; without it, Mozilla's. sqlx trusts Mozilla's *as well* when `sslrootcert`
//! is given, and that cannot be turned off; so use `verify-full`, where a stranger's certificate does not help.
//!
//! The provider of the cryptography is passed explicitly everywhere: a library must neither depend on the process-wide
//! default nor set it.

use std::{fmt, path::Path, sync::Arc};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
};

use tokio_postgres_rustls::MakeRustlsConnect;

use crate::error::{Error, Kind, Result};

/// TLS for the listener's connections: which certificates are accepted, and which one is shown.
///
/// Whether a connection is encrypted at all stands in `tokio_postgres::Config`
/// ([`ssl_mode`](tokio_postgres::Config::ssl_mode)); with `SslMode::Disable` this is not used.
///
/// The default is the meaning of `sslmode=verify-full` without `sslrootcert`: certificates for the server's host name,
/// issued by an authority that Mozilla trusts.
#[derive(Clone)]
pub struct TlsConfig(MakeRustlsConnect);

impl TlsConfig {
    /// Any settings of rustls.
    #[must_use]
    pub fn new(config: ClientConfig) -> Self {
        Self(MakeRustlsConnect::new(config))
    }

    /// What this `sslmode` means. With [`Mode::Disable`] nobody uses the result.
    pub(crate) fn for_mode(mode: Mode, files: &Files) -> Result<Self> {
        client_config(mode, files).map(Self::new)
    }

    /// What tokio-postgres connects with.
    pub(crate) fn connector(&self) -> MakeRustlsConnect {
        self.0.clone()
    }
}

impl Default for TlsConfig {
    fn default() -> Self {
        Self::for_mode(Mode::VerifyFull, &Files::default()).expect("the built-in authorities are well-formed")
    }
}

impl fmt::Debug for TlsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsConfig").finish_non_exhaustive() // it may hold a private key
    }
}

/// `sslmode`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Mode {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl Mode {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "disable" => Self::Disable,
            "prefer" => Self::Prefer,
            "require" => Self::Require,
            "verify-ca" => Self::VerifyCa,
            "verify-full" => Self::VerifyFull,
            _ => return None,
        })
    }

    /// Whether the certificate is looked at, and `sslrootcert` means anything.
    pub(crate) fn verifies(self) -> bool {
        matches!(self, Self::VerifyCa | Self::VerifyFull)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disable => "disable",
            Self::Prefer => "prefer",
            Self::Require => "require",
            Self::VerifyCa => "verify-ca",
            Self::VerifyFull => "verify-full",
        })
    }
}

/// One PEM file, read once: both drivers get these bytes, and a file that cannot be read is an error before anything
/// connects. A renewed file counts from the next start.
#[derive(Clone)]
pub(crate) struct Pem {
    /// For messages: the URL's parameter and the path.
    what: String,
    pub(crate) bytes: Vec<u8>,
}

impl Pem {
    pub(crate) fn read(parameter: &str, path: &Path) -> Result<Self> {
        let what = format!("{parameter}={}", path.display());
        let bytes =
            std::fs::read(path).map_err(|error| Error::with(Kind::Config, format!("cannot read {what}"), error))?;
        Ok(Self { what, bytes })
    }

    fn error(&self, problem: impl fmt::Display) -> Error {
        Error::new(Kind::Config, format!("{}: {problem}", self.what))
    }

    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>> {
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.bytes).collect();
        let certificates = certificates.map_err(|error| self.error(error))?;
        if certificates.is_empty() {
            // sqlx would go on without a word, trusting others than the caller wrote down.
            return Err(self.error("there is no certificate in this file"));
        }
        Ok(certificates)
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>> {
        PrivateKeyDer::from_pem_slice(&self.bytes).map_err(|error| self.error(error))
    }
}

/// What the URL says about certificates.
#[derive(Clone, Default)]
pub(crate) struct Files {
    /// `sslrootcert`.
    pub(crate) root: Option<Pem>,
    /// `sslcert` and `sslkey`.
    pub(crate) client: Option<(Pem, Pem)>,
}

fn client_config(mode: Mode, files: &Files) -> Result<ClientConfig> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .expect("ring supports the default protocol versions");
    let builder = if mode.verifies() {
        let webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(roots(files.root.as_ref())?), provider)
            .build()
            .map_err(|error| Error::new(Kind::Config, format!("sslrootcert: {error}")))?;
        match mode {
            Mode::VerifyFull => builder.with_webpki_verifier(webpki),
            _ => builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyName(webpki))),
        }
    } else {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
    };
    match &files.client {
        None => Ok(builder.with_no_client_auth()),
        Some((certificate, key)) => builder
            .with_client_auth_cert(certificate.certificates()?, key.private_key()?)
            .map_err(|error| certificate.error(error)),
    }
}

fn roots(file: Option<&Pem>) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    match file {
        None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
        Some(pem) => {
            for certificate in pem.certificates()? {
                roots.add(certificate).map_err(|error| pem.error(error))?;
            }
        }
    }
    Ok(roots)
}

/// `prefer` and `require`: against eavesdroppers, not against impostors.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// `verify-ca`: everything that `verify-full` checks but the name.
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        match self.0.verify_server_cert(certificate, intermediates, name, ocsp, now) {
            // The name is checked last, when the chain has been found good.
            Err(TlsError::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            result => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

#[cfg(all(test, feature = "cli"))] // the throw-away server is part of that feature
mod tests;
