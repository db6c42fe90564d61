package config

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestReferenceGolden(t *testing.T) {
	const golden = "testdata/reference.golden"
	got := Reference()
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the structs changed: read the difference, then run `go test ./config -update`\n%s", got)
	}
}

func TestNamesAreOurs(t *testing.T) {
	for _, f := range Fields() {
		if !strings.HasPrefix(f.Name, Prefix) || serviceLink.MatchString(f.Name) {
			t.Errorf("%s is not ours, or looks like a Kubernetes service link", f.Name)
		}
		if f.Doc == "" || f.Form == "" || f.Why == "" {
			t.Errorf("%s lacks a doc, form or why tag", f.Name)
		}
	}
}

func TestDefaults(t *testing.T) {
	data := t.TempDir()
	e := []string{"SALLYPORT_DATA=" + data, "PATH=/bin"}
	g, err := LoadGateway(e)
	if err != nil {
		t.Fatal(err)
	}
	if g.Listen != "127.0.0.1:8443" || g.Socket != filepath.Join(data, "gateway", "api.sock") || g.ChannelListen != "" ||
		g.Database != filepath.Join(data, "gateway", "sallyport.db") || g.AdminListen != "127.0.0.1:9190" {
		t.Errorf("gateway defaults: %+v", g)
	}
	r, err := LoadRCP(e)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Listen) != 1 || r.Listen[0] != (SideListen{Addr: ":9090"}) || r.AdminListen != "127.0.0.1:9191" || r.PendingMax != 10000 {
		t.Errorf("rcp defaults: %+v", r)
	}
	n, err := LoadNode(e)
	if err != nil {
		t.Fatal(err)
	}
	if n.Mode != Managed || n.Carrier != CarrierAuto || len(n.AllowCommands) != 0 || !n.AllowPolicyCommands.Any() ||
		!n.AllowPaths.Any() || n.AdminListen != "127.0.0.1:9192" || n.SpoolMax != 256<<20 {
		t.Errorf("node defaults: %+v", n)
	}
}

// An operator who empties an allow list means nothing, not the default.
func TestEmptyAllowListAllowsNothing(t *testing.T) {
	n, err := LoadNode([]string{"SALLYPORT_DATA=/d", "SALLYPORT_NODE_ALLOW_POLICY_COMMANDS=", "SALLYPORT_NODE_ALLOW_PATHS=none"})
	if err != nil {
		t.Fatal(err)
	}
	if len(n.AllowPolicyCommands) != 0 || len(n.AllowPaths) != 0 {
		t.Errorf("got %v and %v, want nothing", n.AllowPolicyCommands, n.AllowPaths)
	}
}

func TestValues(t *testing.T) {
	const id = "0b6a6c52-6a0e-4f3c-9a8e-0f2a4f1d7c11"
	n, err := LoadNode([]string{
		"SALLYPORT_DATA=/d", "SALLYPORT_NODE_UPSTREAMS=a:1; [::1]:2," + id + " ;", "SALLYPORT_NODE_TAGS=role=web, env=prod",
		"SALLYPORT_NODE_ALLOW_COMMANDS=/usr/bin/*;/bin/sh", "SALLYPORT_LOG_LEVEL=Debug", "SALLYPORT_NODE_ADMIN_LISTEN=off",
	})
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(n.Upstreams) != "[a:1 [::1]:2,"+id+"]" || n.Tags["env"] != "prod" || len(n.Tags) != 2 || len(n.AllowCommands) != 2 ||
		n.LogLevel.Level() != slog.LevelDebug || n.AdminListen != "" {
		t.Errorf("got %+v", n)
	}
	r, err := LoadRCP([]string{"SALLYPORT_DATA=/d", "SALLYPORT_RCP_LISTEN=:1@upstream;[::]:2@downstream;:3", "SALLYPORT_RCP_UPSTREAMS=" + id, "SALLYPORT_RCP_LANES=off"})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Listen) != 3 || r.Listen[0].Side != Upstream || r.Listen[1].Side != Downstream || r.Upstreams[0].ID != id || len(r.Upstreams.Dialled()) != 0 || !r.Lanes.Off() {
		t.Errorf("got %+v", r)
	}
	if r, err = LoadRCP([]string{"SALLYPORT_DATA=/d"}); err != nil || r.Lanes.Off() {
		t.Errorf("lanes are off by default: %+v, %v", r, err)
	}
}

func TestAccept(t *testing.T) {
	g, err := LoadGateway([]string{"SALLYPORT_DATA=/d", "SALLYPORT_GATEWAY_ACCEPT= acme=10.0.0.1:443 ; otlp.internal=[::1]:4318;"})
	if err != nil {
		t.Fatal(err)
	}
	if s, ok := g.Accept.Find("otlp.internal"); !ok || s.Addr != "[::1]:4318" || len(g.Accept) != 2 {
		t.Errorf("%+v", g.Accept)
	}
	if _, ok := g.Accept.Find("else"); ok {
		t.Error("found what is not there")
	}
}

func TestAllowTargets(t *testing.T) {
	for value, want := range map[string]string{
		"": "none", "none": "none", "*": "*:*", " DB.Example.com.:5432 ; *.lan:4?? ": "db.example.com:5432;*.lan:4??",
		"[2001:DB8::0001]:*;[fe80::*]:1": "[2001:db8::1]:*;[fe80::*]:1", "[::ffff:10.0.0.1]:80": "10.0.0.1:80",
	} {
		n, err := LoadNode([]string{"SALLYPORT_DATA=/d", "SALLYPORT_NODE_ALLOW_TARGETS=" + value})
		if err != nil {
			t.Errorf("%q: %v", value, err)
			continue
		}
		if got, err := n.AllowTargets.MarshalText(); err != nil || string(got) != want || n.AllowTargets.Any() != (want == "*:*") {
			t.Errorf("%q: %s, %v; want %s", value, got, err, want)
		}
	}
}

func TestRefusals(t *testing.T) {
	gateway := func(e []string) error { _, err := LoadGateway(e); return err }
	rcp := func(e []string) error { _, err := LoadRCP(e); return err }
	node := func(e []string) error { _, err := LoadNode(e); return err }
	operator := func(e []string) error { _, err := LoadOperator(e); return err }
	long := strings.Repeat("x", 120)
	for _, c := range []struct {
		load func([]string) error
		set  string
		want string
	}{
		{node, "SALLYPORT_NODE_CARIER=h2", "SALLYPORT_NODE_CARIER: unknown variable; did you mean SALLYPORT_NODE_CARRIER?"},
		{rcp, "SALLYPORT_FROBNICATE=1", "`sallyport config reference`"},
		{node, "SALLYPORT_NODE_CARRIER=quic", `SALLYPORT_NODE_CARRIER: "quic" is not accepted; want auto, h2 or h3`},
		{node, "SALLYPORT_NODE_MODE=rw", "want managed or readonly"},
		{node, "SALLYPORT_NODE_TAGS=web", "want key=value"},
		{node, "SALLYPORT_NODE_TAGS=a=1,a=2", "two values"},
		{node, "SALLYPORT_NODE_NAME=Web 1", "is not a name"},
		{node, "SALLYPORT_NODE_UPSTREAMS=host", "want host:port"},
		{node, "SALLYPORT_NODE_UPSTREAMS=host:0", "no usable port"},
		{node, "SALLYPORT_NODE_UPSTREAMS=2001:db8::1:9090", "in brackets: [2001:db8::1]:9090"},
		{node, "SALLYPORT_NODE_UPSTREAMS=host:1,dmz", "is not a UUID"},
		{node, "SALLYPORT_NODE_UPSTREAMS=0b6a6c52-6a0e-4f3c-9a8e-0f2a4f1d7c11", "UUID without an address"},
		{node, "SALLYPORT_NODE_ALLOW_COMMANDS=[", "is not a pattern"},
		{node, "SALLYPORT_NODE_ALLOW_TARGETS=db", "want host:port with * and ?"},
		{node, "SALLYPORT_NODE_ALLOW_TARGETS=db:0", "want host:port"},
		{node, "SALLYPORT_NODE_ALLOW_TARGETS=db:", "want host:port"},
		{node, "SALLYPORT_NODE_ALLOW_TARGETS=::1:80", "an IPv6 address in brackets"},
		{node, "SALLYPORT_NODE_ALLOW_TARGETS=a:1,b:2", "separated by ;"},
		{node, "SALLYPORT_NODE_ALLOW_TARGETS=10.0.0.0/8:80", "want host:port"},
		{node, "SALLYPORT_NODE_SPOOL_MAX=1T", "is not a size"},
		{node, "SALLYPORT_NODE_ADMIN_LISTEN=9192", "is not an address"},
		{node, "SALLYPORT_LOG_LEVEL=loud", "want debug, info, warn or error"},
		{node, "SALLYPORT_LOG_FORMAT=xml", "want text or json"},
		{node, "SALLYPORT_DATA=/" + long, "choose a shorter directory"},
		{rcp, "SALLYPORT_RCP_LANES=maybe", "want on or off"},
		{rcp, "SALLYPORT_RCP_PROXY_LISTEN=20080", "want host:port"},
		{node, "SALLYPORT_NODE_PROXY_LISTEN=localhost", "want host:port"},
		{gateway, "SALLYPORT_GATEWAY_EVENT_RETENTION=90m", "want 1d or longer, or 0s"},
		{gateway, "SALLYPORT_GATEWAY_AUDIT_RETENTION=1y", "is not a duration"},
		{gateway, "SALLYPORT_GATEWAY_ACCEPT=acme", "want name=host:port"},
		{gateway, "SALLYPORT_GATEWAY_ACCEPT=acme=host", "service acme"},
		{gateway, "SALLYPORT_GATEWAY_ACCEPT=*=host:1", "want name=host:port"},
		{gateway, "SALLYPORT_GATEWAY_ACCEPT=acme=a:1;acme=b:2", "stands there twice"},
		{rcp, "SALLYPORT_RCP_LISTEN=:1@sideways", "want upstream or downstream"},
		{rcp, "SALLYPORT_RCP_PENDING_MAX=0", "at least 1"},
		{gateway, "SALLYPORT_GATEWAY_NATS=nats://h:4222", "not supported yet"},
		{gateway, "SALLYPORT_GATEWAY_DATABASE=postgres://u:hunter2@h/db", "not supported yet"},
		{gateway, "SALLYPORT_GATEWAY_CHANNEL_PUBLIC=gw:9443", "SALLYPORT_GATEWAY_CHANNEL_LISTEN is not"},
		{operator, "SALLYPORT_URL=http://h", "http:// is refused"},
		{operator, "SALLYPORT_URL=https://h", "SALLYPORT_TOKEN_FILE"},
		{operator, "SALLYPORT_URL=ftp://h", "want https://"},
	} {
		err := c.load([]string{"HOME=/h", "SALLYPORT_DATA=/d", c.set})
		if !errors.Is(err, ErrConfig) || !strings.Contains(fmt.Sprint(err), c.want) {
			t.Errorf("%s: got %v, want a configuration error with %q", c.set, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error repeats a password", c.set)
		}
	}
}

func TestServiceLinksAreIgnored(t *testing.T) {
	links := []string{
		"SALLYPORT_SERVICE_HOST=10.0.0.1", "SALLYPORT_SERVICE_PORT=1", "SALLYPORT_SERVICE_PORT_HTTPS=1", "SALLYPORT_PORT=tcp://10.0.0.1:1",
		"SALLYPORT_PORT_8443_TCP=x", "SALLYPORT_GATEWAY_PORT_8443_TCP_ADDR=x", "SALLYPORT_GATEWAY_SERVICE_HOST=x",
	}
	if err := Known(links); err != nil {
		t.Error(err)
	}
	if err := Known([]string{"SALLYPORT_PORTS=1"}); err == nil {
		t.Error("SALLYPORT_PORTS is no service link, and was accepted")
	}
}

func TestCompletionScriptsAreIgnored(t *testing.T) {
	if err := Known([]string{"SALLYPORT_ACTIVE_HELP=0", "SALLYPORT_RCP_ACTIVE_HELP=0", "SALLYPORT_NODE_ACTIVE_HELP=0"}); err != nil {
		t.Error(err)
	}
	if err := Known([]string{"SALLYPORT_GATEWAY_ACTIVE_HELP=0"}); err == nil {
		t.Error("no program is called sallyport-gateway, and its variable was accepted")
	}
}

func TestDefaultData(t *testing.T) {
	for _, c := range []struct {
		env  map[string]string
		uid  int
		want string
	}{
		{map[string]string{"HOME": "/h"}, 0, SystemData},
		{map[string]string{"HOME": "/h", "XDG_DATA_HOME": "/x"}, 7, "/x/sallyport"},
		{map[string]string{"HOME": "/h", "XDG_DATA_HOME": "x"}, 7, "/h/.local/share/sallyport"},
	} {
		if got, err := defaultData(c.env, c.uid); err != nil || got != c.want {
			t.Errorf("%v: got %q, %v", c.env, got, err)
		}
	}
	if _, err := defaultData(nil, 7); !errors.Is(err, ErrConfig) {
		t.Errorf("without HOME: got %v", err)
	}
}

func TestSecretHides(t *testing.T) {
	const code = "sp1.c2VjcmV0"
	n, err := LoadNode([]string{"SALLYPORT_DATA=/d", "SALLYPORT_NODE_JOIN=" + code})
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	logger := slog.New(slog.NewJSONHandler(&log, nil))
	logger.Info("x", "join", n.Join, "secret", Secret(code), "struct", struct{ S Secret }{code})
	checks, err := Check([]string{"SALLYPORT_DATA=/d", "SALLYPORT_NODE_JOIN=" + code}, "node")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{log.String(), fmt.Sprint(n.Join), fmt.Sprintf("%v %+v %s", Secret(code), struct{ S Secret }{code}, Secret(code)), fmt.Sprintf("%#v", Secret(code)), fmt.Sprint(checks)} {
		if strings.Contains(s, "c2VjcmV0") {
			t.Errorf("shown: %s", s)
		}
	}
	if n.Join.Reveal() != code {
		t.Error("the code is lost")
	}
}

func TestJoinTellsCodesFromPaths(t *testing.T) {
	for value, shown := range map[string]string{" sp1.abc\n": hidden, "/etc/sallyport/join": "/etc/sallyport/join", "-": "-", "": ""} {
		var j Join
		if err := j.UnmarshalText([]byte(value)); err != nil {
			t.Fatal(err)
		}
		if j.String() != shown || j.Reveal() != strings.TrimSpace(value) || j.IsZero() != (value == "") {
			t.Errorf("%q: shown as %q, revealed as %q", value, j, j.Reveal())
		}
	}
}

func TestCheckSaysWhatIsOpened(t *testing.T) {
	checks, err := Check([]string{"SALLYPORT_DATA=/d", "SALLYPORT_RCP_LISTEN=:7@downstream", "SALLYPORT_NODE_ALLOW_COMMANDS=*"}, "rcp", "node")
	if err != nil {
		t.Fatal(err)
	}
	all := fmt.Sprintf("%+v", checks)
	for _, want := range []string{"tcp+udp :7", "Source:environment", "unix /d/node/local.sock", "ad hoc actions run"} {
		if !strings.Contains(all, want) {
			t.Errorf("%q is missing in %s", want, all)
		}
	}
	if strings.Contains(all, "Kind:dial What:tcp") {
		t.Errorf("an RCP without dial targets is said to dial: %s", all)
	}
	bad, err := Check([]string{"SALLYPORT_DATA=/d", "SALLYPORT_RCP_LANES=yes", "SALLYPORT_X=1"}, "rcp")
	if err != nil || len(bad[0].Problems) != 2 {
		t.Errorf("got %+v, %v", bad, err)
	}
	if _, err := Check(nil, "king"); !errors.Is(err, ErrConfig) {
		t.Errorf("unknown role: %v", err)
	}
}

func TestOperatorToken(t *testing.T) {
	f := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(f, []byte("abc\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	o, err := LoadOperator([]string{"SALLYPORT_DATA=/d", "SALLYPORT_URL=https://h:1/", "SALLYPORT_TOKEN_FILE=" + f})
	if err != nil || o.URL != "https://h:1" {
		t.Fatalf("got %+v, %v", o, err)
	}
	if tok, err := o.Token(); err != nil || tok.Reveal() != "abc" {
		t.Errorf("got %q, %v", tok.Reveal(), err)
	}
	if err := os.WriteFile(f, []byte("two words"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := o.Token(); !errors.Is(err, ErrConfig) {
		t.Errorf("two words: %v", err)
	}
}
