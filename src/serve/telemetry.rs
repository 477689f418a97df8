//! The log, and traces and metrics by OTLP.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use axum::http::HeaderMap;
use opentelemetry::{
    KeyValue,
    metrics::MeterProvider as _,
    propagation::{Extractor, TextMapPropagator as _},
    trace::TracerProvider as _,
};
use opentelemetry_otlp::{MetricExporter, Protocol, SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource, metrics::SdkMeterProvider, propagation::TraceContextPropagator, trace::SdkTracerProvider,
};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use super::{
    app::App,
    metrics::{Values, families},
    options::LogFormat,
};
use crate::cli::logs;

/// What is to be sent before the process ends.
#[derive(Default)]
pub(crate) struct Telemetry {
    traces: Option<SdkTracerProvider>,
    metrics: Option<SdkMeterProvider>,
}

/// What is logged, if `RUST_LOG` does not say.
const LOGGED: &str = "warn";

/// What is traced, whatever is logged. Requests are, and cost nothing where nobody collects them.
const TRACED: &str = "rowcache=info";

impl Telemetry {
    /// Starts the log, and traces if there is somewhere to send them to.
    pub(crate) fn start(format: LogFormat, endpoint: Option<&str>, name: &str) -> Result<Self> {
        let filter = || EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(logs::filter(LOGGED)));
        let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let log = match format {
            LogFormat::Text => log.with_filter(filter()).boxed(),
            LogFormat::Json => log.json().with_filter(filter()).boxed(),
        };
        let Some(endpoint) = endpoint else {
            tracing_subscriber::registry().with(log).try_init().context("cannot start the log")?;
            return Ok(Self::default());
        };
        let resource = Resource::builder()
            .with_service_name("rowcache")
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .with_attribute(KeyValue::new("service.instance.id", name.to_owned()))
            .build();
        let to = |signal: &str| format!("{}/v1/{signal}", endpoint.trim_end_matches('/'));
        let spans = SpanExporter::builder().with_http().with_protocol(Protocol::HttpBinary).with_endpoint(to("traces"));
        let spans = spans.build().context("cannot send traces by OTLP")?;
        let traces = SdkTracerProvider::builder().with_batch_exporter(spans).with_resource(resource.clone()).build();
        let metrics =
            MetricExporter::builder().with_http().with_protocol(Protocol::HttpBinary).with_endpoint(to("metrics"));
        let metrics = metrics.build().context("cannot send metrics by OTLP")?;
        let metrics = SdkMeterProvider::builder().with_periodic_exporter(metrics).with_resource(resource).build();
        let traced =
            tracing_opentelemetry::layer().with_tracer(traces.tracer("rowcache")).with_filter(EnvFilter::new(TRACED));
        tracing_subscriber::registry().with(log).with(traced).try_init().context("cannot start the log")?;
        Ok(Self { traces: Some(traces), metrics: Some(metrics) })
    }

    /// Sends what is measured, from now on.
    pub(crate) fn measure(&self, app: &Arc<App>) {
        let Some(metrics) = &self.metrics else { return };
        let meter = metrics.meter("rowcache");
        for family in families(app) {
            let (app, name) = (Arc::downgrade(app), family.name);
            // By the same names as for Prometheus, with a point where OpenTelemetry has one.
            let shown = format!("rowcache.{name}");
            let unit = family.unit.as_ref().map_or("1", |unit| match unit.as_str() {
                "seconds" => "s",
                "bytes" => "By",
                _ => "1",
            });
            let values = move || {
                app.upgrade()
                    .and_then(|app| families(&app).into_iter().find(|family| family.name == name))
                    .map(|family| family.values)
            };
            match family.values {
                Values::Counter(_) => {
                    meter
                        .u64_observable_counter(shown)
                        .with_description(family.help)
                        .with_unit(unit)
                        .with_callback(move |observer| {
                            let Some(Values::Counter(all)) = values() else { return };
                            for (labels, value) in all {
                                observer.observe(value, &attributes(labels));
                            }
                        })
                        .build();
                }
                Values::Gauge(_) => {
                    meter
                        .f64_observable_gauge(shown)
                        .with_description(family.help)
                        .with_unit(unit)
                        .with_callback(move |observer| {
                            let Some(Values::Gauge(all)) = values() else { return };
                            for (labels, value) in all {
                                observer.observe(value, &attributes(labels));
                            }
                        })
                        .build();
                }
                // OpenTelemetry cannot be given a histogram that somebody else has counted: how many, and how long together.
                Values::Times(_) => {
                    let counts = values.clone();
                    meter
                        .u64_observable_counter(format!("{shown}.count"))
                        .with_description(family.help)
                        .with_callback(move |observer| {
                            let Some(Values::Times(all)) = counts() else { return };
                            for (labels, times) in all {
                                observer.observe(times.count(), &attributes(labels));
                            }
                        })
                        .build();
                    meter
                        .f64_observable_counter(format!("{shown}.total"))
                        .with_description(family.help)
                        .with_unit(unit)
                        .with_callback(move |observer| {
                            let Some(Values::Times(all)) = values() else { return };
                            for (labels, times) in all {
                                observer.observe(times.total().as_secs_f64(), &attributes(labels));
                            }
                        })
                        .build();
                }
            }
        }
    }

    /// Sends what is left.
    pub(crate) fn end(self) {
        // Whoever collects them may be gone; there is nobody left to tell but the log.
        if let Some(Err(error)) = self.traces.map(|traces| traces.shutdown()) {
            tracing::warn!("the last traces could not be sent: {error}");
        }
        if let Some(Err(error)) = self.metrics.map(|metrics| metrics.shutdown()) {
            tracing::warn!("the last metrics could not be sent: {error}");
        }
    }
}

fn attributes(labels: Vec<(&'static str, String)>) -> Vec<KeyValue> {
    labels.into_iter().map(|(name, value)| KeyValue::new(name, value)).collect()
}

/// Makes a request's span part of the trace that its `traceparent` names.
pub(crate) fn follow(span: &Span, headers: &HeaderMap) {
    if headers.contains_key("traceparent") {
        // Without a collector there is no trace to be part of.
        let _ = span.set_parent(TraceContextPropagator::new().extract(&Headers(headers)));
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(axum::http::HeaderName::as_str).collect()
    }
}
