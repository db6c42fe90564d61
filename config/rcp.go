package config

// Carrier says what a dialler may use.
type Carrier string

// The carriers.
const (
	CarrierAuto Carrier = "auto"
	CarrierH2   Carrier = "h2"
	CarrierH3   Carrier = "h3"
)

// UnmarshalText accepts auto, h2 and h3.
func (c *Carrier) UnmarshalText(b []byte) error {
	v, err := oneOf(string(b), string(CarrierAuto), string(CarrierH2), string(CarrierH3))
	*c = Carrier(v)
	return err
}

// Switch is on or off.
type Switch string

// UnmarshalText accepts on and off.
func (s *Switch) UnmarshalText(b []byte) error {
	v, err := oneOf(string(b), "on", off)
	*s = Switch(v)
	return err
}

// Off tells whether something was switched off that is on by default.
func (s Switch) Off() bool { return s == off }

// RCP is the configuration of `run rcp` and sallyport-rcp.
type RCP struct {
	Common
	Listen           SideListens `env:"SALLYPORT_RCP_LISTEN" envDefault:":9090" doc:"TCP and UDP addresses of the channels; @upstream or @downstream limits who may connect there" form:"host:port[@side];..." why:"every interface: an RCP is there to be reached"`
	Upstreams        Endpoints   `env:"SALLYPORT_RCP_UPSTREAMS" doc:"gateways or RCPs to dial; a bare UUID is an RCP that may dial us as upstream" form:"host:port[,uuid] or uuid;..." why:"none: without an address no dialler exists at run time"`
	Downstreams      Endpoints   `env:"SALLYPORT_RCP_DOWNSTREAMS" doc:"listening nodes or RCPs to dial" form:"host:port[,uuid];..." why:"none: an RCP that dials nothing needs no outbound rule"`
	Join             Join        `env:"SALLYPORT_RCP_JOIN" doc:"join code, or where it is" form:"sp1..., a file, a directory of files or -" why:"none: without an identity a party needs a code, later none"`
	Lanes            Switch      `env:"SALLYPORT_RCP_LANES" envDefault:"on" doc:"bare lanes: joined TCP connections for bulk, of which the RCP reads nothing" form:"on or off" why:"on: a quarter of the CPU for the same bytes; off: bulk goes over TLS connections beside the channels (sealed lanes)"`
	ProxyListen      Listen      `env:"SALLYPORT_RCP_PROXY_LISTEN" doc:"HTTP proxy for clients in the RCP's network: their way to the services that a gateway names in SALLYPORT_GATEWAY_ACCEPT; 20080 by custom" form:"host:port or off" why:"off: nobody at the remote site starts requests"`
	Carrier          Carrier     `env:"SALLYPORT_RCP_CARRIER" envDefault:"auto" doc:"carrier of the channels that the RCP dials" form:"auto, h2 or h3" why:"races QUIC and HTTP/2, and stays on what works"`
	PendingMax       Count       `env:"SALLYPORT_RCP_PENDING_MAX" envDefault:"10000" doc:"parties without a certificate that may wait at once" form:"a number" why:"a site that is rolled out at once, in less than 1 GiB"`
	PendingPerSource Count       `env:"SALLYPORT_RCP_PENDING_PER_SOURCE" envDefault:"1000" doc:"the same per source address (per /64 for IPv6)" form:"a number" why:"a thousand honest nodes may share one address behind NAT"`
	AdminListen      Listen      `env:"SALLYPORT_RCP_ADMIN_LISTEN" envDefault:"127.0.0.1:9191" doc:"address of /metrics, /livez and /readyz" form:"host:port or off" why:"loopback: the box is exposed"`
}

// LoadRCP reads environ, as os.Environ returns it.
func LoadRCP(environ []string) (RCP, error) {
	var c RCP
	err := load(&c, environ)
	return c, err
}

func (c *RCP) common() *Common { return &c.Common }

func (c *RCP) validate() error {
	if err := c.Downstreams.needAddresses("SALLYPORT_RCP_DOWNSTREAMS"); err != nil {
		return err
	}
	return checkSocketPath("SALLYPORT_DATA", c.LocalSocket("rcp"))
}
