//! The manifests for Kubernetes fit the schemas of its releases, ask for no privilege, and
//! have the proxy run as it is documented.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ppv2_lab::{output, output_of, write};
use serde_json::{Value, json};

use super::markdown::Page;
use super::{root, yaml};

const FOLDER: &str = "proxy/packaging/kubernetes";
const BASES: [&str; 2] = ["base", "host-network"];
const PAGE: &str = "docs/guides/kubernetes.md";
/// The first release that has `preStop.sleep` without a feature gate, and the latest known.
const RELEASES: [&str; 2] = ["1.30", "1.37"];

/// The resources of a base, as its kustomization lists them.
fn resources(base: &str) -> Vec<Value> {
    let folder = root().join(FOLDER).join(base);
    let read = |name: &str| yaml::documents(&fs::read_to_string(folder.join(name)).unwrap());
    let kustomization = read("kustomization.yaml").remove(0);
    let listed = kustomization["resources"].as_array().unwrap();
    let listed: BTreeSet<_> = listed.iter().map(|name| name.as_str().unwrap()).collect();
    let there: BTreeSet<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "kustomization.yaml")
        .collect();
    assert_eq!(listed, there.iter().map(String::as_str).collect());

    let resources: Vec<_> = listed.into_iter().flat_map(read).collect();
    let namespace = &kustomization["namespace"];
    for resource in &resources {
        let of = match resource["kind"].as_str() {
            Some("Namespace") => &resource["metadata"]["name"],
            _ => &resource["metadata"]["namespace"],
        };
        assert_eq!(of, namespace, "{base}: {resource}");
    }
    resources
}

/// The one resource of this kind.
fn one<'a>(resources: &'a [Value], kind: &str) -> &'a Value {
    let mut found = resources.iter().filter(|r| r["kind"] == kind);
    let one = found.next().unwrap_or_else(|| panic!("no {kind}"));
    assert!(found.next().is_none(), "more than one {kind}");
    one
}

/// The Deployment or the DaemonSet.
fn workload(resources: &[Value]) -> &Value {
    let mut found = resources.iter();
    found
        .find(|r| r["kind"] == "Deployment" || r["kind"] == "DaemonSet")
        .unwrap()
}

fn configuration(resources: &[Value]) -> &str {
    let map = one(resources, "ConfigMap");
    map["data"]["proxy.toml"].as_str().unwrap()
}

/// Asserts that the schemas of every release allow the file, and know all of its fields.
fn is_valid(file: &Path) {
    let tool = root().join("target/tools/python/bin/kubernetes-validate");
    assert!(
        tool.exists(),
        "kubernetes-validate is missing: run `.ci/python-tools target/tools/python`"
    );
    for release in RELEASES {
        let mut command = Command::new(&tool);
        command.args(["--strict", "-k", release]).arg(file);
        let (code, report, error) = output_of(&mut command);
        assert_eq!(code, Some(0), "{file:?} in {release}: {report}{error}");
    }
}

#[test]
fn manifests_fit_the_schemas() {
    for base in BASES {
        let mut checked = 0;
        for entry in fs::read_dir(root().join(FOLDER).join(base)).unwrap() {
            let path = entry.unwrap().path();
            if !path.ends_with("kustomization.yaml") {
                is_valid(&path);
                checked += 1;
            }
        }
        assert!(checked >= 3, "{base}");
    }
}

#[test]
fn manifests_of_the_page_fit_the_schemas() {
    let folder = tempfile::tempdir().unwrap();
    let page = Page::parse(&fs::read_to_string(root().join(PAGE)).unwrap());
    let mut kinds = BTreeSet::new();
    for block in page.blocks.iter().filter(|block| block.info == "yaml") {
        let documents = yaml::documents(&block.text);
        let of_others = ["kustomize.config.k8s.io/", "gateway.networking.k8s.io/"];
        let group = documents[0]["apiVersion"].as_str().unwrap();
        if !of_others.iter().any(|other| group.starts_with(other)) {
            is_valid(&write(&folder, "manifest.yaml", &block.text));
        }
        kinds.insert(documents[0]["kind"].as_str().unwrap().to_owned());
    }
    for kind in ["Kustomization", "NetworkPolicy", "Service", "UDPRoute"] {
        assert!(kinds.contains(kind), "{kind}: {kinds:?}");
    }
}

#[test]
fn configurations_pass_check() {
    let folder = tempfile::tempdir().unwrap();
    for base in BASES {
        let resources = resources(base);
        let config = configuration(&resources);
        let file = write(&folder, "proxy.toml", config);
        let (code, report, error) = output(&["check", "--config", file.to_str().unwrap()]);
        assert_eq!(code, Some(0), "{base}: {error}");
        let warnings = report.lines().filter(|line| line.starts_with("warning:"));
        for warning in warnings {
            // The name is known to a cluster only.
            assert!(warning.contains("svc.cluster.local"), "{base}: {warning}");
        }
        assert!(config.contains("\"srv:_dns._udp.resolvers."), "{base}");
    }
}

/// What the Pod Security Standard `restricted` asks for, and a root that can't be written.
#[test]
fn pods_have_no_privilege() {
    for base in BASES {
        let resources = resources(base);
        let pod = &workload(&resources)["spec"]["template"]["spec"];
        let security = &pod["securityContext"];
        assert_eq!(security["runAsNonRoot"], true);
        assert!(security["runAsUser"].as_u64().unwrap() > 0);
        assert_eq!(
            security["seccompProfile"],
            json!({"type": "RuntimeDefault"})
        );
        assert_eq!(pod["automountServiceAccountToken"], false);
        assert!(pod["hostPID"].is_null() && pod["hostIPC"].is_null());
        assert!(pod["initContainers"].is_null());
        let containers = pod["containers"].as_array().unwrap();
        assert_eq!(containers.len(), 1);
        assert_eq!(
            containers[0]["securityContext"],
            json!({
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": {"drop": ["ALL"]},
            })
        );
        let volumes = pod["volumes"].as_array().unwrap();
        let of_config_maps = volumes.iter().all(|v| !v["configMap"].is_null());
        assert!(of_config_maps, "{volumes:?}");

        let is_on_host = base == "host-network";
        assert_eq!(pod["hostNetwork"] == true, is_on_host);
        let labels = &one(&resources, "Namespace")["metadata"]["labels"];
        let level = if is_on_host {
            "privileged"
        } else {
            "restricted"
        };
        assert_eq!(labels["pod-security.kubernetes.io/enforce"], level);
    }
}

#[test]
fn manifests_and_configuration_agree() {
    for base in BASES {
        let resources = resources(base);
        let config: toml::Table = configuration(&resources).parse().unwrap();
        let workload = workload(&resources);
        let pod = &workload["spec"]["template"]["spec"];
        let container = &pod["containers"][0];

        // The ports of the file have names, which Service, probes and NetworkPolicy use.
        let port_of = |text: &toml::Value| {
            let (_, port) = text.as_str().unwrap().rsplit_once(':').unwrap();
            port.parse::<u64>().unwrap()
        };
        let listen = config["listener"][0]["bind"][0].clone();
        let ports = container["ports"].as_array().unwrap();
        let named = |name| ports.iter().find(|port| port["name"] == name).unwrap();
        assert_eq!(named("dns")["containerPort"], port_of(&listen));
        assert_eq!(named("dns")["protocol"], "UDP");
        let admin = &config["admin"]["listen"];
        assert_eq!(named("admin")["containerPort"], port_of(admin));
        for (probe, path) in [("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")] {
            let request = &container[probe]["httpGet"];
            assert_eq!(request["path"], path);
            assert_eq!(request["port"], "admin");
            let host = request["host"].as_str().unwrap_or("0.0.0.0");
            assert!(admin.as_str().unwrap().starts_with(host), "{admin}");
        }

        // The pod ends by itself before Kubernetes ends it.
        let drain = config["drain_timeout"].as_str().unwrap();
        let drain: u64 = drain.strip_suffix('s').unwrap().parse().unwrap();
        let sleep = &container["lifecycle"]["preStop"]["sleep"]["seconds"];
        let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
        assert!(grace >= sleep.as_u64().unwrap_or(0) + drain + 5, "{grace}");

        // The command exists, and reads the file of the ConfigMap.
        let arguments = container["args"].as_array().unwrap();
        let arguments = arguments.iter().map(|argument| argument.as_str().unwrap());
        let command = std::iter::once("ppv2-proxy").chain(arguments);
        let command: Vec<_> = command.collect();
        <ppv2_proxy::cli::Arguments as clap::Parser>::try_parse_from(&command).unwrap();
        let mount = container["volumeMounts"][0]["mountPath"].as_str().unwrap();
        assert!(command.contains(&format!("{mount}/proxy.toml").as_str()));
        assert_eq!(
            pod["volumes"][0]["configMap"]["name"],
            one(&resources, "ConfigMap")["metadata"]["name"]
        );

        // Everything selects the same pods.
        let labels = &workload["spec"]["template"]["metadata"]["labels"];
        assert_eq!(&workload["spec"]["selector"]["matchLabels"], labels);
        if base == "base" {
            let service = one(&resources, "Service");
            assert_eq!(&service["spec"]["selector"], labels);
            assert_eq!(service["spec"]["externalTrafficPolicy"], "Local");
            assert_eq!(service["spec"]["ports"][0]["targetPort"], "dns");
            let budget = one(&resources, "PodDisruptionBudget");
            assert_eq!(&budget["spec"]["selector"]["matchLabels"], labels);
            let policy = &one(&resources, "NetworkPolicy")["spec"];
            assert_eq!(&policy["podSelector"]["matchLabels"], labels);
            assert_eq!(policy["policyTypes"], json!(["Ingress", "Egress"]));
            // Only clients come from everywhere.
            for rule in policy["ingress"].as_array().unwrap() {
                let is_open = rule["from"].is_null();
                assert_eq!(is_open, rule["ports"][0]["port"] == "dns", "{rule}");
            }
        }
    }
}

#[test]
fn manifests_and_image_agree() {
    let image = fs::read_to_string(root().join("proxy/packaging/container/Containerfile")).unwrap();
    let value = |name: &str| {
        let line = image.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name}")).trim()
    };
    let command: Value = serde_json::from_str(value("CMD ")).unwrap();
    let command = command.as_array().unwrap();
    for base in BASES {
        let resources = resources(base);
        let pod = &workload(&resources)["spec"]["template"]["spec"];
        let security = &pod["securityContext"];
        let user = [&security["runAsUser"], &security["runAsGroup"]].map(Value::to_string);
        assert_eq!(user.join(":"), value("USER "));
        let container = &pod["containers"][0];
        // The entry point is the image's.
        assert!(container["command"].is_null());
        let arguments = container["args"].as_array().unwrap();
        assert!(arguments.starts_with(command), "{arguments:?}");
        let folder = container["volumeMounts"][0]["mountPath"].as_str().unwrap();
        assert_eq!(*command.last().unwrap(), format!("{folder}/proxy.toml"));
    }
}

/// As far as it goes without a cluster: start, probes, a name without servers, SIGTERM.
#[test]
fn the_proxy_runs_and_drains_by_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let resources = resources("base");
    let [listener, admin] = [(); 2].map(|()| ppv2_lab::address("127.0.0.1"));
    let config = configuration(&resources)
        .replace("0.0.0.0:5300", &listener.to_string())
        .replace("0.0.0.0:9901", &admin.to_string());
    let mut proxy = ppv2_lab::proxy_with(&folder, &config);
    for path in ["/healthz", "/readyz"] {
        assert_eq!(ppv2_lab::http_get(admin, path).0, 200, "{path}");
    }
    // The name has no servers here, and the proxy serves all the same.
    let client = ppv2_lab::socket("127.0.0.1");
    client
        .set_read_timeout(Some(Duration::from_millis(1)))
        .unwrap();
    client.send_to(b"hello", listener).unwrap();
    ppv2_lab::eventually("the drop to be counted", || {
        let name = "ppv2_dropped_datagrams_total{listener=\"dns\",reason=\"no_server\"}";
        ppv2_lab::metric(admin, name) == 1
    });
    proxy.signal("TERM");
    let (status, log) = proxy.wait();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.contains("shutting down"), "{log}");
}
