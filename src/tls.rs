//! stub
#[derive(Clone, Debug)]
pub struct TlsConfig;
impl TlsConfig {
    pub(crate) fn connector(&self) -> crate::Result<tokio_postgres::NoTls> {
        Ok(tokio_postgres::NoTls)
    }
}
