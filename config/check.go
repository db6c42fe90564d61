package config

import (
	"cmp"
	"encoding"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/caarlos0/env/v10"
)

// Setting is one variable as it is in force.
type Setting struct {
	Variable string `json:"variable"`
	Value    string `json:"value"`  // secrets hidden
	Source   string `json:"source"` // environment, default
	Doc      string `json:"doc"`
}

// Surface is one thing that a role opens, reaches or permits by its settings.
type Surface struct {
	Kind     string `json:"kind"`     // listen, dial, permit
	What     string `json:"what"`     // an address, a path, a list
	Who      string `json:"who"`      // who gets at it
	Variable string `json:"variable"` // which setting to change
}

// RoleCheck says what one role would run with.
type RoleCheck struct {
	Role     string    `json:"role"`
	Settings []Setting `json:"settings"`
	Surface  []Surface `json:"surface"`
	Problems []string  `json:"problems"`
}

// Check reads environ as each of the roles would, without starting anything.
// Unknown variables are a problem of every role.
func Check(environ []string, roles ...string) ([]RoleCheck, error) {
	set := env.ToMap(environ)
	var out []RoleCheck
	for _, g := range groups() {
		if !slices.Contains(roles, g.role) {
			continue
		}
		c := RoleCheck{Role: g.role, Settings: []Setting{}, Surface: []Surface{}, Problems: []string{}}
		if err := Known(environ); err != nil {
			c.Problems = append(c.Problems, strings.Split(err.Error(), "\n")...)
		}
		if err := parse(g.v, set); err != nil {
			c.Problems = append(c.Problems, strings.Split(err.Error(), "\n")...)
		} else {
			c.Settings = settingsOf(g.v, set)
			if s, ok := g.v.(interface{ surface() []Surface }); ok {
				c.Surface = append(c.Surface, s.surface()...)
			}
		}
		out = append(out, c)
	}
	if len(out) != len(roles) {
		return nil, fmt.Errorf("%w: roles are gateway, rcp, node, pki, signer and operator", ErrConfig)
	}
	return out, nil
}

func settingsOf(v validator, set map[string]string) []Setting {
	var out []Setting
	ref := reflect.ValueOf(v).Elem()
	for _, f := range fieldsOf(v) {
		s := Setting{Variable: f.Name, Value: show(ref.FieldByName(f.goName)), Source: "default", Doc: f.Doc}
		if value, ok := set[f.Name]; ok && (value != "" || isList(f.typ)) {
			s.Source = "environment"
		}
		if f.typ == reflect.TypeFor[Duration]() { // as it was written: 90d, and not 12w6d
			s.Value = cmp.Or(set[f.Name], f.Default)
		}
		out = append(out, s)
	}
	return out
}

func show(v reflect.Value) string {
	if m, ok := v.Interface().(encoding.TextMarshaler); ok {
		if b, err := m.MarshalText(); err == nil {
			return string(b)
		}
	}
	return fmt.Sprint(v.Interface())
}

const (
	kindListen = "listen"
	kindDial   = "dial"
	kindPermit = "permit"
)

func listens(l Listen, proto, who, variable string) []Surface {
	if l == "" {
		return nil
	}
	return []Surface{{kindListen, proto + " " + string(l), who, variable}}
}

func dials(l Endpoints, who, variable string) []Surface {
	var out []Surface
	for _, e := range l.Dialled() {
		out = append(out, Surface{kindDial, "tcp+udp " + e.String(), who, variable})
	}
	return out
}

func localSocket(c Common, role string) Surface {
	return Surface{kindListen, "unix " + c.LocalSocket(role), "any local user reads status and sends events; changes need root or the service user", "SALLYPORT_DATA"}
}

const adminWho = "anybody who reaches it: metrics and health, no changes"

func (c *Gateway) surface() []Surface {
	out := listens(c.Listen, "tcp", "operators with an API token", "SALLYPORT_GATEWAY_LISTEN")
	out = append(out,
		Surface{kindListen, "unix " + c.Socket, "root and the group of the socket, as admin", "SALLYPORT_GATEWAY_SOCKET"},
		localSocket(c.Common, "gateway"))
	out = append(out, listens(c.ChannelListen, "tcp+udp", "RCPs and nodes with a certificate, or pending", "SALLYPORT_GATEWAY_CHANNEL_LISTEN")...)
	out = append(out, listens(c.AdminListen, "tcp", adminWho, "SALLYPORT_GATEWAY_ADMIN_LISTEN")...)
	if c.PKI != "" {
		what := "tcp " + c.PKI
		if strings.HasPrefix(c.PKI, "/") {
			what = "unix " + c.PKI
		}
		out = append(out, Surface{kindDial, what, "the certificate authority, as one of its gateways", "SALLYPORT_GATEWAY_PKI"})
	}
	if len(c.Doors) > 0 {
		what := show(reflect.ValueOf(c.Doors))
		out = append(out, Surface{kindPermit, what + " on tcp " + string(c.Listen) + ", and as " + c.DoorsName, "anybody who reaches it, without an API token", "SALLYPORT_GATEWAY_DOORS"},
			Surface{kindPermit, show(reflect.ValueOf(c.DoorsAllow)), "names that the doors certify", "SALLYPORT_GATEWAY_DOORS_ALLOW"})
	}
	out = append(out, listens(c.DoorsListen, "tcp", "anybody who reaches it: CRL, OCSP and CA certificates, no changes", "SALLYPORT_GATEWAY_DOORS_LISTEN")...)
	for _, v := range c.Accept {
		out = append(out, Surface{kindDial, "tcp " + v.Addr, "clients at the proxies of RCPs and nodes, who ask for " + v.Name, "SALLYPORT_GATEWAY_ACCEPT"})
	}
	return append(out, dials(c.RCPs, "RCPs of this trust domain, beside those of rcp add", "SALLYPORT_GATEWAY_RCPS")...)
}

func (c *RCP) surface() []Surface {
	var out []Surface
	for _, l := range c.Listen {
		who := map[Side]string{
			"":         "gateways, nodes and RCPs with a certificate, or pending",
			Upstream:   "gateways and upstream RCPs with a certificate",
			Downstream: "nodes and RCPs with a certificate, or pending",
		}[l.Side]
		out = append(out, Surface{kindListen, "tcp+udp " + l.Addr, who, "SALLYPORT_RCP_LISTEN"})
	}
	out = append(out, localSocket(c.Common, "rcp"))
	out = append(out, listens(c.AdminListen, "tcp", adminWho, "SALLYPORT_RCP_ADMIN_LISTEN")...)
	out = append(out, listens(c.ProxyListen, "tcp", "anybody who reaches it: asks for services of SALLYPORT_GATEWAY_ACCEPT", "SALLYPORT_RCP_PROXY_LISTEN")...)
	out = append(out, dials(c.Upstreams, "as downstream: takes requests from it", "SALLYPORT_RCP_UPSTREAMS")...)
	return append(out, dials(c.Downstreams, "as upstream", "SALLYPORT_RCP_DOWNSTREAMS")...)
}

func (c *Node) surface() []Surface {
	out := []Surface{localSocket(c.Common, "node")}
	out = append(out, listens(c.Listen, "tcp+udp", "RCPs with a certificate", "SALLYPORT_NODE_LISTEN")...)
	out = append(out, listens(c.AdminListen, "tcp", adminWho, "SALLYPORT_NODE_ADMIN_LISTEN")...)
	out = append(out, listens(c.ProxyListen, "tcp", "anybody who reaches it: asks for services of SALLYPORT_GATEWAY_ACCEPT", "SALLYPORT_NODE_PROXY_LISTEN")...)
	out = append(out, dials(c.Upstreams, "as downstream: takes requests that a gateway signed", "SALLYPORT_NODE_UPSTREAMS")...)
	if c.Join.IsZero() && len(c.Upstreams) == 0 {
		out = append(out, Surface{kindDial, "what the identity on disk and the gateway's RCP list say", "as downstream", "SALLYPORT_NODE_UPSTREAMS"})
	}
	for _, p := range []struct {
		list     Globs
		who      string
		variable string
	}{
		{c.AllowCommands, "ad hoc actions run", "SALLYPORT_NODE_ALLOW_COMMANDS"},
		{c.AllowPolicyCommands, "policies run", "SALLYPORT_NODE_ALLOW_POLICY_COMMANDS"},
		{c.AllowPaths, "files policies write", "SALLYPORT_NODE_ALLOW_PATHS"},
	} {
		if len(p.list) > 0 {
			out = append(out, Surface{kindPermit, strings.Join(p.list, ";"), p.who, p.variable})
		}
	}
	if len(c.Challenges) > 0 {
		out = append(out, Surface{kindPermit, show(reflect.ValueOf(c.Challenges)), "ACME challenges are looked at, at ports 80 and 443", "SALLYPORT_NODE_CHALLENGES"})
	}
	if len(c.AllowTargets) > 0 {
		out = append(out, Surface{kindPermit, show(reflect.ValueOf(c.AllowTargets)), "operators reach by relayed requests and connections", "SALLYPORT_NODE_ALLOW_TARGETS"})
	}
	return out
}
