package config

import (
	"path/filepath"
	"strings"
	"time"
)

// Gateway is the configuration of `run gateway`, the embedded CA included.
type Gateway struct {
	Common
	Listen          Listen    `env:"SALLYPORT_GATEWAY_LISTEN" envDefault:"127.0.0.1:8443" doc:"HTTPS address of the API" form:"host:port or off" why:"loopback: opening the API to a network is a decision"`
	Socket          string    `env:"SALLYPORT_GATEWAY_SOCKET" doc:"unix socket of the API (mode 0660 for the group sallyport, else its owner's or root's alone); who may open it is admin" form:"a path" why:"$SALLYPORT_DATA/gateway/api.sock: where the operator commands look"`
	RCPs            Endpoints `env:"SALLYPORT_GATEWAY_RCPS" doc:"RCPs to dial, beside those added with rcp add" form:"host:port[,uuid];..." why:"none: rcp add also makes the join code"`
	ChannelListen   Listen    `env:"SALLYPORT_GATEWAY_CHANNEL_LISTEN" doc:"TCP and UDP address for RCPs and nodes that dial the gateway" form:"host:port or off" why:"off: nothing needs an inbound port into the trusted network"`
	ChannelPublic   string    `env:"SALLYPORT_GATEWAY_CHANNEL_PUBLIC" doc:"that address as others reach it, for join codes" form:"host:port" why:"none: NAT and balancers make it unknowable from here"`
	Database        string    `env:"SALLYPORT_GATEWAY_DATABASE" doc:"SQLite file" form:"a path; postgres://... is not supported yet" why:"$SALLYPORT_DATA/gateway/sallyport.db: embedded, no server to run"`
	NATS            string    `env:"SALLYPORT_GATEWAY_NATS" doc:"message bus between several gateways" form:"empty; other values are not supported yet" why:"empty: one gateway needs none"`
	PKI             string    `env:"SALLYPORT_GATEWAY_PKI" doc:"where the CA is, if it is a process of its own (run pki): this gateway then holds no CA key" form:"host:port, or the absolute path of a unix socket" why:"empty: the CA is in this process, in $SALLYPORT_DATA/pki"`
	PKICodeFile     string    `env:"SALLYPORT_GATEWAY_PKI_CODE_FILE" doc:"file with the code of ca gateway add, which makes this gateway known to that CA; not needed any more once it is" form:"a path" why:"none: the CA is in this process"`
	TargetLimit     int       `env:"SALLYPORT_GATEWAY_TARGET_LIMIT" envDefault:"1000" doc:"connections and relayed requests at once through one target; more are refused (429)" form:"a number from 1 on" why:"one busy target leaves files and memory to the others"`
	WarmSessions    int       `env:"SALLYPORT_GATEWAY_WARM_SESSIONS" envDefault:"512" doc:"end-to-end sessions that stay open for a moment after use; the next change or action needs no handshake" form:"a number from 1 on" why:"each takes about 100 KiB here and 30 KiB at an RCP"`
	Accept          Services  `env:"SALLYPORT_GATEWAY_ACCEPT" doc:"services of the trusted network that clients at the proxies of RCPs and nodes may reach, by these names and no others" form:"name=host:port;..." why:"none: it is the one way from outside into the trusted network"`
	Doors           Doors     `env:"SALLYPORT_GATEWAY_DOORS" envDefault:"off" doc:"doors for the certificates of other programs, on the API's address and for clients at the proxies of nodes and RCPs: ACME, EST, CRL and OCSP (status), and the SPIFFE trust bundle" form:"acme;est;status;bundle or off" why:"off: nothing is certified but nodes and RCPs"`
	DoorsAllow      NameRules `env:"SALLYPORT_GATEWAY_DOORS_ALLOW" envDefault:"none" doc:"names that may be certified; with @selector only for clients of the nodes with such tags, which operators or join codes gave them" form:"glob[@selector];... or none" why:"none: whoever owns a node answers for every name that it may have"`
	DoorsName       string    `env:"SALLYPORT_GATEWAY_DOORS_NAME" envDefault:"doors.sallyport" doc:"host name under which clients at the proxies of nodes and RCPs find the doors" form:"a host name" why:"it needs no DNS: the proxies know it"`
	DoorsURL        BaseURL   `env:"SALLYPORT_GATEWAY_DOORS_URL" doc:"where certificates of the doors say that their CRL and OCSP responder are" form:"http://host[:port]" why:"none: who looks for them where they cannot be reached waits in vain"`
	DoorsListen     Listen    `env:"SALLYPORT_GATEWAY_DOORS_LISTEN" envDefault:"off" doc:"plain HTTP address of CRL, OCSP and the CA's certificates, which carry their own signatures" form:"host:port or off" why:"off: the API's address serves them over https"`
	Carrier         Carrier   `env:"SALLYPORT_GATEWAY_CARRIER" envDefault:"auto" doc:"carrier of the channels that the gateway dials" form:"auto, h2 or h3" why:"races QUIC and HTTP/2, and stays on what works"`
	BackupPass      string    `env:"SALLYPORT_BACKUP_PASSPHRASE_FILE" doc:"file with the passphrase of backups, for backup and restore without --passphrase-file" form:"a path" why:"none: a person is asked"`
	RenewalGrace    Duration  `env:"SALLYPORT_GATEWAY_RENEWAL_GRACE" envDefault:"365d" doc:"how long after the end of its certificate a party that still has its key, and is not revoked, is given a new one without being asked for a join code" form:"a duration; 0s: never" why:"a machine that was switched off for a season comes back by itself"`
	EventRetention  Duration  `env:"SALLYPORT_GATEWAY_EVENT_RETENTION" envDefault:"90d" doc:"how long events are kept that are closed, merged into another or good news (severity normal), and what was noted of lost ones; a problem stays until it is closed, and one that is closed late goes soon after: age counts from when it came" form:"a duration from 1d on; 0s: for ever" why:"a database that only grows fills its disk"`
	ActionRetention Duration  `env:"SALLYPORT_GATEWAY_ACTION_RETENTION" envDefault:"90d" doc:"how long actions that have ended are kept, with their output" form:"a duration from 1d on; 0s: for ever" why:"as that of events"`
	AuditRetention  Duration  `env:"SALLYPORT_GATEWAY_AUDIT_RETENTION" envDefault:"0s" doc:"how long the audit log is kept" form:"a duration from 1d on; 0s: for ever" why:"who may forget what was done is a decision; a million entries take about 200 MB"`
	AdminListen     Listen    `env:"SALLYPORT_GATEWAY_ADMIN_LISTEN" envDefault:"127.0.0.1:9190" doc:"address of /metrics, /livez and /readyz" form:"host:port or off" why:"loopback: metrics name nodes"`
}

// LoadGateway reads environ, as os.Environ returns it.
func LoadGateway(environ []string) (Gateway, error) {
	var c Gateway
	err := load(&c, environ)
	return c, err
}

func (c *Gateway) common() *Common { return &c.Common }

func (c *Gateway) validate() error {
	if c.Socket == "" {
		c.Socket = filepath.Join(c.Dir("gateway"), "api.sock")
	}
	if err := checkSocketPath("SALLYPORT_GATEWAY_SOCKET", c.Socket); err != nil {
		return err
	}
	switch {
	case c.Database == "":
		c.Database = filepath.Join(c.Dir("gateway"), "sallyport.db")
	case strings.HasPrefix(c.Database, "postgres://"), strings.HasPrefix(c.Database, "postgresql://"):
		// The value may hold a password: it is not repeated.
		return wrong("SALLYPORT_GATEWAY_DATABASE", "PostgreSQL is not supported yet; leave it empty, or name a file for SQLite")
	case strings.Contains(c.Database, "://"):
		return wrong("SALLYPORT_GATEWAY_DATABASE", "want the path of a SQLite file, not a URL")
	}
	if c.NATS != "" {
		return wrong("SALLYPORT_GATEWAY_NATS", "several gateways are not supported yet; leave it empty")
	}
	if c.PKI != "" {
		if err := checkDoor("SALLYPORT_GATEWAY_PKI", c.PKI, false); err != nil {
			return err
		}
	} else if c.PKICodeFile != "" {
		return wrong("SALLYPORT_GATEWAY_PKI_CODE_FILE", "is set, but SALLYPORT_GATEWAY_PKI is not: the certificate authority is in this process and needs no code")
	}
	for _, r := range []struct {
		name string
		life Duration
	}{{"EVENT", c.EventRetention}, {"ACTION", c.ActionRetention}, {"AUDIT", c.AuditRetention}} {
		if r.life != 0 && time.Duration(r.life) < minRetention {
			return wrong("SALLYPORT_GATEWAY_"+r.name+"_RETENTION", "want 1d or longer, or 0s to keep all")
		}
	}
	if c.TargetLimit < 1 {
		return wrong("SALLYPORT_GATEWAY_TARGET_LIMIT", "want a number from 1 on")
	}
	if c.WarmSessions < 1 {
		return wrong("SALLYPORT_GATEWAY_WARM_SESSIONS", "want a number from 1 on")
	}
	if err := c.RCPs.needAddresses("SALLYPORT_GATEWAY_RCPS"); err != nil {
		return err
	}
	if err := c.checkDoors(); err != nil {
		return err
	}
	if c.ChannelPublic != "" {
		if err := checkAddr(c.ChannelPublic, false); err != nil {
			return wrong("SALLYPORT_GATEWAY_CHANNEL_PUBLIC", "%v", err)
		}
		if c.ChannelListen == "" {
			return wrong("SALLYPORT_GATEWAY_CHANNEL_PUBLIC", "is set, but SALLYPORT_GATEWAY_CHANNEL_LISTEN is not: nothing would listen there")
		}
	}
	return nil
}

// minRetention: a shorter life is more often a mistake in the unit than a wish.
const minRetention = 24 * time.Hour

// maxSocketPath is the size of sun_path on Linux, less its terminating zero.
const maxSocketPath = 107

func checkSocketPath(variable, path string) error {
	if len(path) > maxSocketPath {
		return wrong(variable, "the socket %s has a path of %d bytes and the kernel takes %d; choose a shorter directory", quote(path), len(path), maxSocketPath)
	}
	return nil
}
