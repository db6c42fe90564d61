package config

import (
	"fmt"
	"os"
	"regexp"
	"strings"
)

// Mode says whether a node obeys.
type Mode string

// The modes.
const (
	Managed  Mode = "managed"
	Readonly Mode = "readonly" // reports, and obeys nothing that changes it
)

// UnmarshalText accepts managed and readonly.
func (m *Mode) UnmarshalText(b []byte) error {
	v, err := oneOf(string(b), string(Managed), string(Readonly))
	*m = Mode(v)
	return err
}

// Name is what a party would like to be called: a DNS label, because it stands
// in the certificate as <name>.<tenant>.node.<trust-domain>.
type Name string

var dnsLabel = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// UnmarshalText accepts a DNS label in lower case.
func (n *Name) UnmarshalText(b []byte) error {
	if err := CheckName(string(b)); err != nil {
		return err
	}
	*n = Name(b)
	return nil
}

// CheckName refuses what cannot be the name of a node or an RCP.
func CheckName(s string) error {
	if !dnsLabel.MatchString(s) {
		return fmt.Errorf("%s is not a name; want 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit", quote(s))
	}
	return nil
}

// Node is the configuration of `run node` and sallyport-node. The allow lists
// bound what any gateway may ask of this host; no gateway can widen them.
type Node struct {
	Common
	Join                Join           `env:"SALLYPORT_NODE_JOIN" doc:"join code, or where it is; a directory holds one file per gateway" form:"sp1..., a file, a directory of files or -" why:"none: without an identity a party needs a code, later none"`
	Upstreams           Endpoints      `env:"SALLYPORT_NODE_UPSTREAMS" doc:"RCPs or gateways to dial, for all gateways that the node serves; wins over the addresses in the join codes and over the RCP lists that gateways send" form:"host:port[,uuid];..." why:"none: the join code and the gateway know"`
	AttestationCert     string         `env:"SALLYPORT_NODE_ATTESTATION_CERT" doc:"file with a device certificate of another CA (IEEE 802.1AR, or the machine's), PEM, leaf first with its intermediates: it vouches for the node when that asks for its certificate; only with SALLYPORT_NODE_ATTESTATION_KEY" form:"a path" why:"none: the join code says who may come"`
	AttestationKey      string         `env:"SALLYPORT_NODE_ATTESTATION_KEY" doc:"file with the key of that certificate, PEM, unencrypted; it is read when it is needed and signs nothing else" form:"a path" why:"none"`
	Name                Name           `env:"SALLYPORT_NODE_NAME" doc:"name that the node asks for" form:"a DNS label" why:"the host name, up to its first dot; the gateway decides"`
	Tags                Tags           `env:"SALLYPORT_NODE_TAGS" doc:"tags that the node claims; those that the gateway or the join code set win" form:"key=value,..." why:"none"`
	Mode                Mode           `env:"SALLYPORT_NODE_MODE" envDefault:"managed" doc:"readonly: reports, and obeys nothing that changes the host" form:"managed or readonly" why:"the agent is there to be managed"`
	Listen              Listen         `env:"SALLYPORT_NODE_LISTEN" doc:"TCP and UDP address for RCPs that dial the node" form:"host:port or off" why:"off: no inbound port into a node's network"`
	Carrier             Carrier        `env:"SALLYPORT_NODE_CARRIER" envDefault:"auto" doc:"carrier of the channels that the node dials" form:"auto, h2 or h3" why:"races QUIC and HTTP/2, and stays on what works"`
	AllowCommands       Globs          `env:"SALLYPORT_NODE_ALLOW_COMMANDS" envDefault:"none" doc:"programs that ad hoc actions may run, by resolved path" form:"globs;..., * or none" why:"none: whoever may run a program of choice owns the host"`
	AllowPolicyCommands Globs          `env:"SALLYPORT_NODE_ALLOW_POLICY_COMMANDS" envDefault:"*" doc:"programs that policies may name: checks, validate and reload commands" form:"globs;..., * or none" why:"any: policies are reviewed, signed and audited"`
	AllowPaths          Globs          `env:"SALLYPORT_NODE_ALLOW_PATHS" envDefault:"*" doc:"paths that files policies may write; never SALLYPORT_DATA, /proc, /sys and /dev" form:"globs;..., * or none" why:"any: policies are reviewed, signed and audited"`
	AllowTargets        HostPorts      `env:"SALLYPORT_NODE_ALLOW_TARGETS" envDefault:"none" doc:"host:port that targets may reach; the name as written must match, and each address that it resolves to as well; link-local and cloud metadata addresses only where they are named literally" form:"globs of host:port;..., * or none" why:"none: a node is no way into its network"`
	Challenges          ChallengeRules `env:"SALLYPORT_NODE_CHALLENGES" envDefault:"none" doc:"host names for which this node looks at ACME challenges for its gateway, at ports 80 and 443 of the host, or at the address behind the =" form:"glob[=host:port];... or none" why:"none: a node is no way into its network"`
	ProxyListen         Listen         `env:"SALLYPORT_NODE_PROXY_LISTEN" doc:"HTTP proxy for clients in the node's network: their way to the services that a gateway names in SALLYPORT_GATEWAY_ACCEPT; 20080 by custom" form:"host:port or off" why:"off: nobody at the remote site starts requests"`
	SpoolMax            Size           `env:"SALLYPORT_NODE_SPOOL_MAX" envDefault:"256M" doc:"disk space for events that no gateway has yet, per gateway; above it events are dropped from the lowest severity up, counted and reported as a gap" form:"bytes, with K, M or G" why:"days of a busy node, and no full disk"`
	AdminListen         Listen         `env:"SALLYPORT_NODE_ADMIN_LISTEN" envDefault:"127.0.0.1:9192" doc:"address of /metrics, /livez and /readyz" form:"host:port or off" why:"loopback: no inbound port into a node's network"`
}

// LoadNode reads environ, as os.Environ returns it.
func LoadNode(environ []string) (Node, error) {
	var c Node
	err := load(&c, environ)
	return c, err
}

func (c *Node) common() *Common { return &c.Common }

func (c *Node) validate() error {
	if err := c.Upstreams.needAddresses("SALLYPORT_NODE_UPSTREAMS"); err != nil {
		return err
	}
	if (c.AttestationCert == "") != (c.AttestationKey == "") {
		return wrong("SALLYPORT_NODE_ATTESTATION_CERT", "it is set without SALLYPORT_NODE_ATTESTATION_KEY, or that without it: the certificate and its key are needed together")
	}
	if c.Name == "" {
		c.Name = hostName()
	}
	return checkSocketPath("SALLYPORT_DATA", c.LocalSocket("node"))
}

// hostName returns the first label of the host's name where it can be a node's
// name; otherwise a gateway names the node by its UUID.
func hostName() Name {
	host, err := os.Hostname()
	if err != nil {
		return ""
	}
	label, _, _ := strings.Cut(strings.ToLower(host), ".")
	if CheckName(label) != nil {
		return ""
	}
	return Name(label)
}
