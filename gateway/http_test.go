package gateway

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyport/config"
	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// serving starts a gateway with its API on a unix socket and, with https, on a
// port of loopback.
func serving(t *testing.T, https bool) (*world, *api.Client) {
	t.Helper()
	w := newWorld(t)
	w.serveAPI(https)
	w.run()
	c, err := api.NewClient(api.ClientConfig{URL: w.cfg.Socket})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	eventually(t, "the API answers", func() bool { _, err := c.About(t.Context()); return err == nil })
	if https {
		eventually(t, "the API listens on its port", func() bool {
			conn, err := net.Dial("tcp", string(w.cfg.Listen))
			if err == nil {
				_ = conn.Close()
			}
			return err == nil
		})
	}
	return w, c
}

func (w *world) serveAPI(https bool) {
	w.cfg.Data = w.dir
	w.cfg.Socket = filepath.Join(w.dir, "api.sock")
	if https {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			w.t.Fatal(err)
		}
		w.cfg.Listen = config.Listen(ln.Addr().String())
		if err := ln.Close(); err != nil {
			w.t.Fatal(err)
		}
	}
}

// addNode stores a node that nobody reports.
func (w *world) addNode(name string, tags map[string]string) wire.ID {
	id := wire.NewID()
	w.update(func(ctx context.Context, tx *store.Tx) error {
		if err := tx.AddNode(ctx, &store.Node{ID: id, Name: name, State: wire.StateDown, KeyHash: wire.HashSPKI([]byte(name))}); err != nil {
			return err
		}
		return tx.SetJoinTags(ctx, id, tags)
	})
	if w.s != nil {
		if err := w.s.nodeChanged(context.Background(), id); err != nil {
			w.t.Fatal(err)
		}
	}
	return id
}

func codeOfError(err error) api.Code {
	var p *api.Problem
	if errors.As(err, &p) {
		return p.Code
	}
	return ""
}

const twoPolicies = `kind: policy
name: motd
type: files
spec: {files: [{path: /etc/motd, content: hello}]}
---
kind: policy
name: up
type: check
spec: {command: [/bin/true], interval: 30s}
---
kind: deployment
name: base
selector: role=web
policies: [motd, up]
`

func applyText(t *testing.T, c *api.Client, text string, dryRun bool) api.Applied {
	t.Helper()
	out, err := c.Apply(t.Context(), api.Apply{Manifests: []api.Manifest{{File: "a.yaml", Text: text}}, DryRun: dryRun})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestApplyOverTheSocket(t *testing.T) {
	t.Parallel()
	w, c := serving(t, false)
	ctx := t.Context()
	web := w.addNode("web-1", map[string]string{"role": "web"})
	w.addNode("db-1", map[string]string{"role": "db"})

	dry := applyText(t, c, twoPolicies, true)
	if len(dry.Objects) != 3 || dry.Objects[0].Change != "created" || dry.Offline != 2 || !dry.DryRun || dry.Summary != "2 nodes change, 0 files restored, 2 offline" {
		t.Errorf("dry run: %+v", dry)
	}
	if ps, err := c.Policies(ctx); err != nil || len(ps) != 0 {
		t.Fatalf("a dry run changed something: %v, %v", ps, err)
	}
	done := applyText(t, c, twoPolicies, false)
	i := slices.IndexFunc(done.Nodes, func(n api.PlannedNode) bool { return n.ID == web })
	if i < 0 || !slices.Equal(done.Nodes[i].Add, []string{"motd", "up"}) || done.Nodes[i].Revision.N == 0 {
		t.Errorf("apply: %+v", done)
	}
	if again := applyText(t, c, twoPolicies, false); len(again.Nodes) != 0 || again.Objects[0].Change != "unchanged" {
		t.Errorf("the same again: %+v", again)
	}
	st, err := c.DeploymentStatus(ctx, "base")
	if err != nil || st.Counts != (api.DeploymentCounts{Offline: 1}) || st.State != api.DeploymentDegraded || len(st.Nodes) != 2 || st.Nodes[0].Policy != "motd" || st.Nodes[0].State != "offline" {
		t.Errorf("status: %+v, %v", st, err)
	}
	n, err := c.Node(ctx, "web")
	if err != nil || n.DesiredRevision != done.Nodes[i].Revision || len(n.Policies) != 2 || !slices.Equal(n.Deployments, []string{"base"}) || n.TagSources[0].Source != "join" {
		t.Errorf("node show: %+v, %v", n, err)
	}

	// A tag takes the node out of the deployment, and another puts one in.
	if _, err := c.TagNode(ctx, "web-1", api.TagChange{Set: map[string]string{"role": "old"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.TagNode(ctx, "db-1", api.TagChange{Set: map[string]string{"role": "web"}}); err != nil {
		t.Fatal(err)
	}
	st, err = c.DeploymentStatus(ctx, "base")
	if err != nil || len(st.Nodes) != 2 || st.Nodes[0].Node != "db-1" {
		t.Errorf("status after tagging: %+v, %v", st, err)
	}
	if err := c.DeletePolicy(ctx, "motd"); codeOfError(err) != api.CodeConflict {
		t.Errorf("a policy in use was deleted: %v", err)
	}
	if _, err := c.DeleteDeployment(ctx, "base"); err != nil {
		t.Fatal(err)
	}
	if ds, err := c.Deployments(ctx); err != nil || len(ds) != 0 {
		t.Errorf("nobody carried it: %+v, %v", ds, err)
	}
	if err := c.DeletePolicy(ctx, "motd"); err != nil {
		t.Errorf("delete policy: %v", err)
	}
	log, err := c.Audit(ctx, api.AuditQuery{})
	if err != nil {
		t.Fatal(err)
	}
	var what []string
	for _, e := range log {
		what = append(what, e.What+" "+e.Result)
		if e.Who == "" || e.Who == "gateway" || e.From != "unix socket" {
			t.Errorf("audit: %+v", e)
		}
	}
	if want := "policy.delete ok,deployment.delete ok,policy.delete refused,node.tag ok,node.tag ok,deployment.apply ok,policy.apply ok,policy.apply ok"; strings.Join(what, ",") != want {
		t.Errorf("audit: %v", what)
	}
}

func TestApplyFaults(t *testing.T) {
	t.Parallel()
	_, c := serving(t, false)
	apply := func(in api.Apply) error { _, err := c.Apply(t.Context(), in); return err }
	text := func(s string) []api.Manifest { return []api.Manifest{{File: "bad.yaml", Text: s}} }
	for name, x := range map[string]struct {
		in   api.Apply
		want string
	}{
		"type":      {api.Apply{Manifests: text("kind: policy\nname: p\ntype: chekc\nspec: {}\n")}, `bad.yaml:3: unknown policy type "chekc"`},
		"missing":   {api.Apply{Manifests: text("kind: deployment\nname: d\nselector: a\npolicies: [nope]\n")}, `bad.yaml:1: deployment d names the policy "nope"`},
		"nothing":   {api.Apply{Manifests: text("")}, "no document to apply"},
		"wrong one": {api.Apply{Manifests: text(twoPolicies), Kind: "node"}, "unknown kind"},
		"left out":  {api.Apply{Manifests: text(twoPolicies), Kind: "deployment"}, `names the policy "motd", which does not exist`},
	} {
		if err := apply(x.in); codeOfError(err) != api.CodeInvalid || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v; want %s", name, err, x.want)
		}
	}
	if ps, err := c.Policies(t.Context()); err != nil || len(ps) != 0 {
		t.Errorf("something was applied: %+v, %v", ps, err)
	}
	if out, err := c.Apply(t.Context(), api.Apply{Manifests: text(twoPolicies), Kind: "policy"}); err != nil || out.Skipped != 1 || len(out.Objects) != 2 {
		t.Errorf("policies only: %+v, %v", out, err)
	}
}

func TestRollback(t *testing.T) {
	t.Parallel()
	_, c := serving(t, false)
	ctx := t.Context()
	applyText(t, c, twoPolicies, false)
	applyText(t, c, strings.ReplaceAll(twoPolicies, "hello", "changed"), false)
	if _, err := c.IfMatch(`"1"`).RollbackPolicy(ctx, "motd", api.Rollback{}); codeOfError(err) != api.CodeChanged {
		t.Errorf("stale ETag: %v", err)
	}
	if _, err := c.RollbackPolicy(ctx, "motd", api.Rollback{To: 7}); codeOfError(err) != api.CodeNotFound {
		t.Errorf("version 7: %v", err)
	}
	out, err := c.IfMatch(`"2"`).RollbackPolicy(ctx, "motd", api.Rollback{})
	if err != nil || out.Objects[0].Version != 3 {
		t.Fatalf("%+v, %v", out, err)
	}
	p, err := c.Policy(ctx, "motd")
	if err != nil || p.Version != 3 || len(p.Versions) != 3 || !strings.Contains(string(p.Spec), "hello") || string(p.Versions[0].Spec) != string(p.Versions[2].Spec) {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestReferences(t *testing.T) {
	t.Parallel()
	w, c := serving(t, false)
	ctx := t.Context()
	id := w.addNode("web-1", nil)
	w.addNode("web-2", nil)
	for ref, want := range map[string]api.Code{"web-1": "", "web-": api.CodeAmbiguous, string(id): "", string(id)[:6]: "", "none": api.CodeNotFound} {
		if _, err := c.Node(ctx, ref); codeOfError(err) != want {
			t.Errorf("show %q: %v; want %q", ref, err, want)
		}
	}
	tag := api.TagChange{Set: map[string]string{"a": "b"}}
	for ref, want := range map[string]api.Code{"web-1": "", "web": api.CodeNotFound, string(id): "", string(id)[:8]: "", string(id)[:7]: api.CodeNotFound} {
		if _, err := c.TagNode(ctx, ref, tag); codeOfError(err) != want {
			t.Errorf("tag %q: %v; want %q", ref, err, want)
		}
	}
	for _, bad := range []api.TagChange{{}, {Set: map[string]string{"a b": "c"}}, {Set: map[string]string{"a": "b,c"}}, {Set: map[string]string{"a": "b"}, Remove: []string{"a"}}} {
		if _, err := c.TagNode(ctx, "web-1", bad); codeOfError(err) != api.CodeInvalid {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	n, err := c.Node(ctx, "web-1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.IfMatch(`"1"`).TagNode(ctx, "web-1", tag); codeOfError(err) != api.CodeChanged {
		t.Errorf("stale ETag: %v", err)
	}
	if _, err := c.IfMatch(n.ETag).TagNode(ctx, "web-1", tag); err != nil {
		t.Errorf("fresh ETag %s: %v", n.ETag, err)
	}
	list, err := c.Nodes(ctx, api.NodeQuery{Selector: "a=b"})
	if err != nil || len(list) != 1 || list[0].Name != "web-1" {
		t.Errorf("%+v, %v", list, err)
	}
	if _, err := c.Nodes(ctx, api.NodeQuery{Selector: "a b"}); codeOfError(err) != api.CodeInvalid {
		t.Errorf("bad selector: %v", err)
	}
}

func TestPaging(t *testing.T) {
	t.Parallel()
	w, c := serving(t, false)
	for i := range 25 {
		w.addNode(fmt.Sprintf("n-%02d", i), nil)
	}
	resp := w.raw(t, http.MethodGet, "/api/v1/nodes?limit=10", "")
	var got []string
	for {
		var page api.List[api.Node]
		if err := json.Unmarshal(resp, &page); err != nil || len(page.Items) > 10 {
			t.Fatalf("%s: %v", resp, err)
		}
		for _, n := range page.Items {
			got = append(got, n.Name)
		}
		if page.Next == "" {
			break
		}
		resp = w.raw(t, http.MethodGet, "/api/v1/nodes?limit=10&cursor="+page.Next, "")
	}
	if len(got) != 25 || !slices.IsSorted(got) {
		t.Errorf("%v", got)
	}
	if _, err := c.Events(t.Context(), api.EventQuery{Page: api.Page{Cursor: "x"}}); codeOfError(err) != api.CodeInvalid {
		t.Errorf("bad cursor: %v", err)
	}
}

// raw sends a request over the socket and returns the answer's body.
func (w *world) raw(t *testing.T, method, path, body string) []byte {
	t.Helper()
	resp := w.http(t, method, path, body)
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// http sends a request over the socket; the caller closes the answer's body.
func (w *world) http(t *testing.T, method, path, body string) *http.Response {
	t.Helper()
	hc := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", w.cfg.Socket)
	}}}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://gateway"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := hc.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

// TestStatesAreListed: each state that there is can be asked for.
func TestStatesAreListed(t *testing.T) {
	t.Parallel()
	w, _ := serving(t, false)
	for list, states := range map[string][]string{
		"nodes": {
			string(wire.StatePending), string(wire.StateRunning), string(wire.StateFailing), string(wire.StateDown), string(wire.StateUnreachable), string(wire.StateReadonly),
			string(wire.StateLocked), string(wire.StateDraining), string(wire.StateQuarantined), string(wire.StateRevoked), string(wire.StateUpgrade),
		},
		"requests": {api.RequestPending, api.RequestGranted, api.RequestDelivered, api.RequestDenied, api.RequestDiscarded, api.RequestFailed, api.RequestExpired},
		"actions": {
			wire.ActionQueued, wire.ActionSent, wire.ActionRunning, wire.ActionSucceeded, wire.ActionFailed, wire.ActionTimedOut,
			wire.ActionCancelled, wire.ActionExpired, wire.ActionRefused, wire.ActionLost,
		},
	} {
		for _, state := range states {
			var p api.Problem
			if b := w.raw(t, http.MethodGet, "/api/v1/"+list+"?state="+state, ""); json.Unmarshal(b, &p) != nil || p.Status != 0 {
				t.Errorf("%s in state %s: %.200s", list, state, b)
			}
		}
	}
}

func TestBadRequests(t *testing.T) {
	t.Parallel()
	w, _ := serving(t, false)
	for name, x := range map[string]struct {
		method, path, body string
		want               api.Code
	}{
		"unknown path":   {http.MethodGet, "/api/v1/nope", "", api.CodeNotFound},
		"outside":        {http.MethodGet, "/", "", api.CodeNotFound},
		"not JSON":       {http.MethodPost, "/api/v1/apply", "{", api.CodeMalformed},
		"unknown key":    {http.MethodPost, "/api/v1/apply", `{"manifests":[],"dryrun":true}`, api.CodeInvalid},
		"wrong type":     {http.MethodPost, "/api/v1/tokens", `{"role":5,"ttl":"1h"}`, api.CodeInvalid},
		"bad duration":   {http.MethodPost, "/api/v1/tokens", `{"role":"viewer","ttl":"1y"}`, api.CodeInvalid},
		"limit":          {http.MethodGet, "/api/v1/nodes?limit=100000", "", api.CodeInvalid},
		"too large":      {http.MethodPost, "/api/v1/tokens", `{"role":"` + strings.Repeat("x", 1<<20-10) + `"}`, api.CodeTooLarge},
		"severity":       {http.MethodGet, "/api/v1/events?severity=bad", "", api.CodeInvalid},
		"node state":     {http.MethodGet, "/api/v1/nodes?state=bad", "", api.CodeInvalid},
		"request state":  {http.MethodGet, "/api/v1/requests?state=bad", "", api.CodeInvalid},
		"action state":   {http.MethodGet, "/api/v1/actions?state=bad", "", api.CodeInvalid},
		"neither":        {http.MethodPost, "/api/v1/actions", `{"command":["true"]}`, api.CodeInvalid},
		"empty selector": {http.MethodPost, "/api/v1/actions", `{"command":["true"],"selector":" "}`, api.CodeInvalid},
		"no parameter":   {http.MethodGet, "/api/v1/nodes?stat=down", "", api.CodeInvalid},
		"no option":      {http.MethodPost, "/api/v1/nodes/x/drain?now=true", "{}", api.CodeInvalid},
		"twice":          {http.MethodGet, "/api/v1/nodes?state=down&state=running", "", api.CodeInvalid},
		"bad query":      {http.MethodGet, "/api/v1/nodes?a;b", "", api.CodeMalformed},
		"no command":     {http.MethodPost, "/api/v1/actions", `{"command":[],"selector":"*"}`, api.CodeInvalid},
	} {
		var p api.Problem
		b := w.raw(t, x.method, x.path, x.body)
		if err := json.Unmarshal(b, &p); err != nil || p.Code != x.want || p.Status == 0 || p.Detail == "" {
			t.Errorf("%s: %.200s; want %s", name, b, x.want)
		}
	}
	var doc struct {
		OpenAPI string                    `json:"openapi"`
		Paths   map[string]map[string]any `json:"paths"`
	}
	if err := json.Unmarshal(w.raw(t, http.MethodGet, "/api/openapi.json", ""), &doc); err != nil || !strings.HasPrefix(doc.OpenAPI, "3.1") || len(doc.Paths) < 30 {
		t.Errorf("openapi %q with %d paths: %v", doc.OpenAPI, len(doc.Paths), err)
	}
}

// A changing call that comes to nothing is in the audit log once, wherever it was
// refused; one that reads is not.
func TestRefusedCallsAreAudited(t *testing.T) {
	t.Parallel()
	w, c := serving(t, false)
	for what, x := range map[string]struct{ method, path, body string }{
		"action.run":    {http.MethodPost, "/api/v1/actions", `{"comand":["true"],"selector":"*"}`},         // by its schema
		"join.create":   {http.MethodPost, "/api/v1/joins", `{`},                                            // not even JSON
		"node.drain":    {http.MethodPost, "/api/v1/nodes/x/drain?now=true", "{}"},                          // by its parameters
		"node.tag":      {http.MethodPost, "/api/v1/nodes/x/tags", `{"set":{"a":"b"}}`},                     // by the operation
		"node.list":     {http.MethodGet, "/api/v1/nodes?stat=down", ""},                                    // changes nothing
		"policy.delete": {http.MethodDelete, "/api/v1/policies/" + strings.Repeat("x", 300), ""},            // by the operation, or before it
		"rule.apply":    {http.MethodPost, "/api/v1/rules", `{"manifests":"` + strings.Repeat("x", 20<<20)}, // too large
	} {
		res := w.http(t, x.method, x.path, x.body)
		_ = res.Body.Close()
		log, err := c.Audit(t.Context(), api.AuditQuery{What: what})
		want := 1
		if x.method == http.MethodGet {
			want = 0
		}
		if err != nil || res.StatusCode < 400 || len(log) != want {
			t.Errorf("%s: %s, %d rows, %v", what, res.Status, len(log), err)
		}
		for _, e := range log {
			if e.Result != "refused" || e.Who == "" || e.Object == "" || e.Detail == "" {
				t.Errorf("%s: %+v", what, e)
			}
		}
	}
}

// A condition that nobody looks at is refused: its sender relies on it.
func TestConditionWhereThereIsNone(t *testing.T) {
	t.Parallel()
	_, c := serving(t, false)
	if _, err := c.IfMatch(`"1"`).CreateJoin(t.Context(), api.CreateJoin{Name: "web"}); codeOfError(err) != api.CodeInvalid || !strings.Contains(err.Error(), "If-Match") {
		t.Errorf("a code was made under a condition: %v", err)
	}
	if joins, err := c.Joins(t.Context()); err != nil || len(joins) != 0 {
		t.Errorf("%d codes, %v", len(joins), err)
	}
}

// Whoever takes the wrong method is told so, and which ones there are.
func TestWrongMethod(t *testing.T) {
	t.Parallel()
	w, _ := serving(t, false)
	for path, x := range map[string]struct{ method, allow string }{
		"/api/v1/nodes":                {http.MethodDelete, "GET, HEAD"},
		"/api/v1/nodes/web-1":          {http.MethodPost, "GET, HEAD, DELETE"},
		"/api/v1/nodes/web-1/drain":    {http.MethodGet, "POST"},
		"/api/v1/rcps/dmz-1":           {http.MethodPut, "GET, HEAD, PATCH, DELETE"},
		"/api/v1/events/tail":          {http.MethodOptions, "GET, HEAD"},
		"/api/openapi.json":            {http.MethodPost, "GET, HEAD"},
		"/api/v1/requests/grant":       {http.MethodGet, "POST"},
		"/api/v1/certificates/x%2Fy/z": {http.MethodGet, ""},
	} {
		res := w.http(t, x.method, path, "")
		var p api.Problem
		err := json.NewDecoder(res.Body).Decode(&p)
		_ = res.Body.Close()
		want := api.CodeMethod
		if x.allow == "" {
			want = api.CodeNotFound
		}
		if err != nil || res.StatusCode != want.Status() || p.Code != want || res.Header.Get("Allow") != x.allow {
			t.Errorf("%s %s: %s, Allow %q, %+v, %v", x.method, path, res.Status, res.Header.Get("Allow"), p, err)
		}
	}
}

func TestSocketPermissions(t *testing.T) {
	t.Parallel()
	w, c := serving(t, false)
	about, err := c.About(t.Context())
	if err != nil || about.Role != api.RoleAdmin || about.Caller == "" || about.Installation != w.db.Installation().UID {
		t.Errorf("%+v, %v", about, err)
	}
	if _, err := listenSocket(w.cfg.Socket); err == nil {
		t.Error("a second gateway took the socket over")
	}
}

// TestSocketIsForOperators: whom the socket lets in is an admin. That is root, its
// owner, whatever the umask is and whichever group he is of, and the group sallyport.
func TestSocketIsForOperators(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	path := filepath.Join(t.TempDir(), "api.sock")
	ln, err := listenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	want, gid := os.FileMode(0o600), st.Sys().(*syscall.Stat_t).Gid
	if g, err := user.LookupGroup("sallyport"); gid == 0 || err == nil && g.Gid == strconv.FormatUint(uint64(gid), 10) {
		want = 0o660
	}
	if st.Mode().Perm() != want {
		t.Errorf("mode %v of group %d, want %v", st.Mode(), gid, want)
	}
}

func (w *world) https(t *testing.T, token string) *api.Client {
	t.Helper()
	roots := x509Pool(t, filepath.Join(w.dir, "gateway", "api-tls", "cert.pem"))
	c, err := api.NewClient(api.ClientConfig{URL: "https://" + string(w.cfg.Listen), Token: token, Roots: roots})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// TestLiveStreamEndsWithItsToken: who has lost a token hears no more by what it
// opened before.
func TestLiveStreamEndsWithItsToken(t *testing.T) {
	t.Parallel()
	w, admin := serving(t, true)
	ctx := t.Context()
	w.addNode("web-1", nil)
	open := func(role api.Role) (id string, client *api.Client, ended <-chan error) {
		tok, err := admin.CreateToken(ctx, api.CreateToken{Role: role, TTL: wire.Duration(time.Hour)})
		if err != nil {
			t.Fatal(err)
		}
		client = w.https(t, tok.Secret)
		seen, end := make(chan struct{}, 10), make(chan error, 1)
		go func() {
			end <- client.WatchNodes(ctx, api.NodeQuery{}, func(api.Node) error { seen <- struct{}{}; return nil })
		}()
		select {
		case <-seen:
		case err := <-end:
			t.Fatalf("the stream ended before it began: %v", err)
		}
		return tok.ID, client, end
	}
	lost, _, lostEnd := open(api.RoleViewer)
	own, self, ownEnd := open(api.RoleAdmin)
	_, _, otherEnd := open(api.RoleViewer)
	if _, err := admin.RevokeToken(ctx, lost); err != nil {
		t.Fatal(err)
	}
	if _, err := self.RevokeToken(ctx, own); err != nil {
		t.Errorf("the answer to a token that revoked itself: %v", err)
	}
	for _, end := range []<-chan error{lostEnd, ownEnd} {
		select {
		case err := <-end:
			if codeOfError(err) != api.CodeUnauthorized {
				t.Errorf("the stream of a revoked token ended with %v", err)
			}
		case <-time.After(waitLimit):
			t.Error("the stream of a revoked token goes on")
		}
	}
	select {
	case err := <-otherEnd:
		t.Errorf("the stream of another token ended: %v", err)
	default:
	}
}

// TestRequestsEndWithTheirToken: at its expiry as when it is revoked, also if
// that came between its check and what it let in.
func TestRequestsEndWithTheirToken(t *testing.T) {
	t.Parallel()
	g := newTokenGate(nil)
	soon, _ := g.hold(t.Context(), &store.Token{ID: "soon", ExpiresAt: g.now().Add(time.Millisecond)})
	<-soon.Done()
	g.cut("late")
	late, end := g.hold(t.Context(), &store.Token{ID: "late", ExpiresAt: g.now().Add(time.Hour)})
	<-late.Done()
	for _, ctx := range []context.Context{soon, late} {
		if err := context.Cause(ctx); codeOfError(err) != api.CodeUnauthorized {
			t.Errorf("it ended with %v", err)
		}
	}
	end()
	if len(g.held) != 1 {
		t.Errorf("requests that are done are still held: %v", g.held)
	}
}

func TestTokensAndRoles(t *testing.T) {
	t.Parallel()
	w, admin := serving(t, true)
	ctx := t.Context()
	w.addNode("web-1", nil)
	clients := map[api.Role]*api.Client{}
	var last api.CreatedToken
	for _, role := range api.Roles {
		tok, err := admin.CreateToken(ctx, api.CreateToken{Name: string(role), Role: role, TTL: wire.Duration(time.Hour)})
		if err != nil || !strings.HasPrefix(tok.Secret, tokenPrefix) {
			t.Fatalf("%+v, %v", tok, err)
		}
		clients[role], last = w.https(t, tok.Secret), tok
	}
	const yes, no = api.Code(""), api.CodeForbidden
	for role, want := range map[api.Role]struct{ read, operate, certify, administer api.Code }{
		api.RoleViewer:             {yes, no, no, no},
		api.RoleOperator:           {yes, yes, no, no},
		api.RoleCertificateOfficer: {yes, no, yes, no},
		api.RoleAdmin:              {yes, yes, yes, yes},
	} {
		c := clients[role]
		_, read := c.Node(ctx, "web-1")
		_, operate := c.TagNode(ctx, "web-1", api.TagChange{Set: map[string]string{"a": string(role)}})
		_, certify := c.RevokeJoin(ctx, "none")
		_, administer := c.Tokens(ctx)
		if codeOfError(certify) == api.CodeNotFound {
			certify = nil // it was let in
		}
		if codeOfError(read) != want.read || codeOfError(operate) != want.operate || codeOfError(certify) != want.certify || codeOfError(administer) != want.administer {
			t.Errorf("%s: read %v, operate %v, certify %v, administer %v", role, read, operate, certify, administer)
		}
	}
	log, err := admin.Audit(ctx, api.AuditQuery{What: "node.tag"})
	if err != nil || len(log) != 4 {
		t.Fatalf("%+v, %v", log, err)
	}
	refused := 0
	for _, e := range log {
		if e.Result == "refused" {
			refused++
		}
		if !strings.HasPrefix(e.Who, "token ") || !strings.HasPrefix(e.From, "127.0.0.1:") {
			t.Errorf("%+v", e)
		}
	}
	if refused != 2 {
		t.Errorf("%d refusals in the audit log; want 2: %+v", refused, log)
	}
	if _, err := admin.RevokeToken(ctx, last.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := clients[last.Role].About(ctx); codeOfError(err) != api.CodeUnauthorized {
		t.Errorf("a revoked token: %v", err)
	}
	for _, tok := range must1(admin.Tokens(ctx)) {
		if want := map[bool]string{true: "revoked", false: "valid"}[tok.ID == last.ID]; tok.State != want || tok.LastUsed == nil {
			t.Errorf("%+v; want %s", tok, want)
		}
	}
}

func must1[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestNetworkNeedsATokenAlsoOnLoopback(t *testing.T) {
	t.Parallel()
	w, admin := serving(t, true)
	ctx := t.Context()
	tok, err := admin.CreateToken(ctx, api.CreateToken{Role: api.RoleViewer, TTL: wire.Duration(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.https(t, "").About(ctx); codeOfError(err) != api.CodeUnauthorized {
		t.Errorf("without a token: %v", err)
	}
	bad := w.https(t, tokenPrefix+"guess")
	for i := range maxBadTokens {
		if _, err := bad.About(ctx); codeOfError(err) != api.CodeUnauthorized {
			t.Errorf("bad token %d: %v", i+1, err)
		}
	}
	if _, err := bad.About(ctx); codeOfError(err) != api.CodeLocked {
		t.Errorf("bad token %d: %v", maxBadTokens+1, err)
	}
	if _, err := w.https(t, tok.Secret).About(ctx); err != nil {
		t.Errorf("a good token from an address that is locked out: %v", err)
	}
	// TLS 1.3 only, and nothing in the clear.
	if c, err := tls.Dial("tcp", string(w.cfg.Listen), &tls.Config{MaxVersion: tls.VersionTLS12, InsecureSkipVerify: true}); err == nil {
		_ = c.Close()
		t.Error("TLS 1.2 was accepted")
	}
	if resp, err := http.Get("http://" + string(w.cfg.Listen) + "/api/v1/about"); err == nil {
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("http: %s", resp.Status)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

// TestWhatAPartyRefusesIsTold: the gateway has not failed, and its log says no more.
func TestWhatAPartyRefusesIsTold(t *testing.T) {
	t.Parallel()
	const dir = "/var/lib/sallyport/node/2d0cfc0a86e7a73a.sallyport/identity/"
	full := "certificate: write " + dir + "chain.pem: rename " + dir + ".chain.pem3033218672998175759 " + dir + "chain.pem: no space left on device"
	for status, want := range map[int]api.Code{422: api.CodeConflict, 500: api.CodeUnavailable} {
		err := refusal(&http.Response{StatusCode: status, Body: io.NopCloser(strings.NewReader(full))})
		p := new(rest).problem(t.Context(), "node.renew", fmt.Errorf("renew: %w", err))
		if p.Code != want || !strings.Contains(p.Error(), "no space left on device") {
			t.Errorf("status %d: %s %v", status, p.Code, p)
		}
	}
	e := &enrolment{ca: unsigning{}}
	_, err := e.issue(t.Context(), wire.IssueRequest{})
	if p := (&rest{log: testLog(t)}).problem(t.Context(), "node.renew", fmt.Errorf("renew: %w", err)); p.Code != api.CodeUnavailable || !strings.Contains(p.Error(), "does not answer") {
		t.Errorf("an authority that is away: %s %v", p.Code, p)
	}
	e.ca = grudging{}
	_, err = e.issue(t.Context(), wire.IssueRequest{})
	if p := (&rest{log: testLog(t)}).problem(t.Context(), "node.renew", fmt.Errorf("renew: %w", err)); p.Code != api.CodeUnavailable || !strings.Contains(p.Error(), "external CA at https://ca refuses") {
		t.Errorf("an external CA that refuses: %s %v", p.Code, p)
	}
}

// grudging is the authority of an external CA that issues nothing.
type grudging struct{ *rollingCA }

func (grudging) Issue(context.Context, wire.IssueRequest) ([][]byte, error) {
	return nil, errors.New("external CA at https://ca refuses: no such provisioner (401 Unauthorized)")
}

func TestExpiredToken(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	defer func() { _ = w.db.Close() }()
	g := newTokenGate(w.db)
	now := time.Now()
	g.now = func() time.Time { return now }
	secret := tokenPrefix + "x"
	w.update(func(ctx context.Context, tx *store.Tx) error {
		return tx.AddToken(ctx, &store.Token{ID: "t", Role: "viewer", Hash: hashSecret(secret), ExpiresAt: now.Add(time.Hour)})
	})
	if _, why, err := g.valid(t.Context(), secret); why != tokenValid || err != nil {
		t.Error(why, err)
	}
	for header, want := range map[string]string{"Bearer " + secret: "", "bearer  " + secret: "", "Bearer": noToken, "Bearer ": noToken, "Basic " + secret: noToken, secret: noToken, "": noToken} {
		req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
		req.Header.Set("Authorization", header)
		if _, no := g.admit(req); (no == nil) != (want == "") || no != nil && no.why != want {
			t.Errorf("%q: %+v", header, no)
		}
	}
	now = now.Add(time.Hour)
	if tok, why, err := g.valid(t.Context(), secret); tok == nil || why != "expired" || err != nil {
		t.Errorf("expired: %v, %q, %v", tok, why, err)
	}
	if tok, why, err := g.valid(t.Context(), secret+"x"); tok != nil || why != tokenUnknown || err != nil {
		t.Errorf("another: %v, %q, %v", tok, why, err)
	}
}

func TestEventCallsAndTail(t *testing.T) {
	t.Parallel()
	w, c := serving(t, false)
	ctx := t.Context()
	id := w.addNode("web-1", nil)
	put := func(seq int64, severity wire.Severity) wire.ID {
		t.Helper()
		e := &wire.Event{ID: wire.NewEventID(), Seq: seq, Time: time.Now(), Severity: severity, Text: fmt.Sprint("event ", seq)}
		if _, err := w.db.StoreOutbox(ctx, id, "s", []wire.OutboxUp{{Event: e}}); err != nil {
			t.Fatal(err)
		}
		return e.ID
	}
	first := put(1, "critical")
	tail, stop := context.WithCancel(ctx)
	defer stop()
	got, ended := make(chan api.Event, 10), make(chan error, 1)
	go func() {
		ended <- c.TailEvents(tail, api.EventQuery{Node: "web-1"}, 0, func(e api.Event) error { got <- e; return nil })
	}()
	if e := <-got; e.ID != first || e.Node != "web-1" {
		t.Errorf("%+v", e)
	}
	second := put(2, "minor")
	if e := <-got; e.ID != second || e.Seq != 2 {
		t.Errorf("%+v", e)
	}
	stop()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("tail ended with %v", err)
	}
	if _, err := c.AckEvent(ctx, string(first)); err != nil {
		t.Fatal(err)
	}
	d, err := c.AnnotateEvent(ctx, string(first), api.Annotate{Text: "seen"})
	if err != nil || d.State != api.EventAcknowledged || len(d.Annotations) != 1 || d.Annotations[0].By == "" {
		t.Errorf("%+v, %v", d, err)
	}
	if _, err := c.CloseEvent(ctx, string(first)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.AckEvent(ctx, string(first)); codeOfError(err) != api.CodeConflict {
		t.Errorf("a closed event was acknowledged: %v", err)
	}
	open, err := c.Events(ctx, api.EventQuery{State: "open", Since: time.Now().Add(-time.Hour)})
	if err != nil || len(open) != 1 || open[0].ID != second {
		t.Errorf("%+v, %v", open, err)
	}
	if none, err := c.Events(ctx, api.EventQuery{Since: time.Now().Add(time.Hour)}); err != nil || len(none) != 0 {
		t.Errorf("%+v, %v", none, err)
	}
}

// Whoever closes an event has closed it, whatever others do at that moment.
func TestAckNeverReopensAClosedEvent(t *testing.T) {
	t.Parallel()
	w, c := serving(t, false)
	id := w.addNode("web-1", nil)
	for i := range 40 {
		e := &wire.Event{ID: wire.NewEventID(), Seq: int64(i + 1), Time: time.Now(), Severity: wire.SeverityMinor, Text: "x"}
		if _, err := w.db.StoreOutbox(t.Context(), id, "s", []wire.OutboxUp{{Event: e}}); err != nil {
			t.Fatal(err)
		}
		var both sync.WaitGroup
		both.Go(func() {
			if _, err := c.CloseEvent(t.Context(), string(e.ID)); err != nil {
				t.Error(err)
			}
		})
		both.Go(func() {
			if _, err := c.AckEvent(t.Context(), string(e.ID)); err != nil && codeOfError(err) != api.CodeConflict {
				t.Error(err)
			}
		})
		both.Wait()
		if d, err := c.Event(t.Context(), string(e.ID)); err != nil || d.State != api.EventClosed {
			t.Fatalf("event %d is %s, %v", i, d.State, err)
		}
	}
}

func TestLiveStreamsAreBounded(t *testing.T) {
	t.Parallel()
	var l liveStreams
	as := func(who string) (context.Context, context.CancelFunc) {
		return context.WithCancel(context.WithValue(context.Background(), askerKey{}, asker{actor: store.Actor{Who: who}}))
	}
	ctx, end := as("eve")
	defer end()
	for range maxStreamsPerCaller {
		if err := l.enter(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.enter(ctx); codeOfError(err) != api.CodeBusy || api.CodeBusy.Status() != http.StatusTooManyRequests {
		t.Fatalf("one more: %v", err)
	}
	for i := range 5 { // who want all there are
		greedy, done := as(fmt.Sprint("greedy ", i))
		defer done()
		for n := 0; l.enter(greedy) == nil; n++ {
			if n >= maxStreamsPerCaller {
				t.Fatalf("one has %d", n)
			}
		}
	}
	if free := maxStreams - l.all; free < 16 {
		t.Fatalf("a few callers left %d", free)
	}
	for i := l.all; i < maxStreams; i++ {
		other, done := as(fmt.Sprint(i))
		defer done()
		if err := l.enter(other); err != nil {
			t.Fatalf("another caller: %v", err)
		}
	}
	bob, done := as("bob")
	defer done()
	if err := l.enter(bob); codeOfError(err) != api.CodeBusy {
		t.Fatalf("above the limit of all: %v", err)
	}
	end()
	eventually(t, "the streams of the one that went away are over", func() bool { return l.enter(bob) == nil })
}

// A caller that has too many live streams is told so with a status; what it
// ends makes room again.
func TestOneStreamTooMany(t *testing.T) {
	t.Parallel()
	w, c := serving(t, false)
	id := w.addNode("web-1", nil)
	w.s.live.mu.Lock()
	w.s.live.all = maxStreams - 1
	w.s.live.mu.Unlock()
	tail := func(ctx context.Context, first chan<- struct{}) error {
		return c.TailEvents(ctx, api.EventQuery{}, 0, func(api.Event) error { close(first); return nil })
	}
	e := &wire.Event{ID: wire.NewEventID(), Seq: 1, Time: time.Now(), Severity: wire.SeverityMinor, Text: "x"}
	if _, err := w.db.StoreOutbox(t.Context(), id, "s", []wire.OutboxUp{{Event: e}}); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	open, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- tail(ctx, open) }()
	<-open
	if err := tail(t.Context(), make(chan struct{})); codeOfError(err) != api.CodeBusy {
		t.Fatalf("one too many: %v", err)
	}
	stop()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the stream ended with %v", err)
	}
	eventually(t, "there is room again", func() bool {
		w.s.live.mu.Lock()
		defer w.s.live.mu.Unlock()
		return w.s.live.all == maxStreams-1 && len(w.s.live.byCaller) == 0
	})
}

// A node's name never stands in for another node's UUID.
func TestUUIDGoesBeforeAName(t *testing.T) {
	t.Parallel()
	w, c := serving(t, false)
	victim := w.addNode("web-1", nil)
	w.addNode(string(victim), nil) // a name that a gateway of an older version took
	if n, err := c.TagNode(t.Context(), string(victim), api.TagChange{Set: map[string]string{"a": "b"}}); err != nil || n.ID != victim {
		t.Fatalf("%s was changed, %v", n.Name, err)
	}
	for _, name := range []string{string(victim), string(victim)[:8], "0123abcd-", "12345678"} {
		_, err := c.CreateJoin(t.Context(), api.CreateJoin{Name: name})
		if codeOfError(err) != api.CodeInvalid {
			t.Errorf("join code for the name %q: %v", name, err)
		}
		if _, err := c.AddRCP(t.Context(), api.AddRCP{Name: name}); codeOfError(err) != api.CodeInvalid {
			t.Errorf("rcp of the name %q: %v", name, err)
		}
	}
}

func TestStreamsEndWithTheServer(t *testing.T) {
	t.Parallel()
	w, c := serving(t, false)
	started, ended := make(chan struct{}), make(chan error, 1)
	w.addNode("web-1", nil)
	go func() {
		ended <- c.WatchNodes(t.Context(), api.NodeQuery{}, func(api.Node) error { close(started); return nil })
	}()
	<-started
	w.stop()
	if err := <-ended; codeOfError(err) != api.CodeUnavailable {
		t.Errorf("%v", err)
	}
}

func TestActionsForAbsentNodes(t *testing.T) {
	t.Parallel()
	w, c := serving(t, false)
	ctx := t.Context()
	w.addNode("web-1", map[string]string{"role": "web"})
	run := api.RunAction{Selector: "role=web", Command: []string{"true"}, Key: "once"}
	out, err := c.StartAction(ctx, run)
	if err != nil || len(out.Actions) != 1 || out.Actions[0].ExitStatus() != api.ExitNotRun || out.Actions[0].Code != api.ActionCodeNotConnected {
		t.Fatalf("%+v, %v", out, err)
	}
	again, err := c.StartAction(ctx, run)
	if err != nil || again.Batch != out.Batch || again.Actions[0].ID != out.Actions[0].ID {
		t.Errorf("the same key ran again: %+v, %v", again, err)
	}
	var ends []api.Action
	err = c.FollowActions(ctx, out.Batch, func(o api.Output) error {
		if o.End != nil {
			ends = append(ends, *o.End)
		}
		return nil
	})
	if err != nil || len(ends) == 0 || ends[len(ends)-1].State != wire.ActionExpired {
		t.Errorf("%+v, %v", ends, err)
	}
	wait, err := c.StartAction(ctx, api.RunAction{Node: "web-1", Command: []string{"true"}, TTL: wire.Duration(time.Hour)})
	if err != nil || wait.Actions[0].State != wire.ActionQueued {
		t.Fatalf("%+v, %v", wait, err)
	}
	if a, err := c.CancelAction(ctx, string(wait.Actions[0].ID)); err != nil || a.State != wire.ActionCancelled {
		t.Errorf("%+v, %v", a, err)
	}
	if _, err := c.StartAction(ctx, api.RunAction{Selector: "role=none", Command: []string{"true"}}); codeOfError(err) != api.CodeNotFound {
		t.Errorf("no node fits: %v", err)
	}
	list, err := c.Actions(ctx, api.ActionQuery{Node: "web-1"})
	if err != nil || len(list) != 2 || list[0].ID != wait.Actions[0].ID {
		t.Errorf("%+v, %v", list, err)
	}
}

// TestBadTokensAreTold: in the log, by one event in a while and in the metrics,
// however many there are; the audit log grows by none of it.
func TestBadTokensAreTold(t *testing.T) {
	t.Parallel()
	w, admin := serving(t, true)
	ctx := t.Context()
	tok, err := admin.CreateToken(ctx, api.CreateToken{Name: "ci", Role: api.RoleViewer, TTL: wire.Duration(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := admin.RevokeToken(ctx, tok.ID); err != nil {
		t.Fatal(err)
	}
	before := must1(admin.Audit(ctx, api.AuditQuery{}))
	_, _ = w.https(t, "").About(ctx)
	for range maxBadTokens {
		_, _ = w.https(t, tok.Secret).About(ctx)
	}
	if own := must1(w.db.Events(ctx, store.EventFilter{Own: true, Key: keyTokens, Limit: 9})); len(own) != 0 {
		t.Errorf("told before it was tried again and again: %+v", own)
	}
	for range 20 {
		_, _ = w.https(t, tok.Secret).About(ctx)
	}
	own := must1(w.db.Events(ctx, store.EventFilter{Own: true, Key: keyTokens, Merged: true, Limit: 9}))
	if len(own) != 1 || own[0].Severity != wire.SeverityWarning || !strings.Contains(own[0].Text, "127.0.0.1 with token "+tok.ID[:8]+" (ci), which is revoked") {
		t.Errorf("%+v; want one event that names source and token", own)
	}
	if after := must1(admin.Audit(ctx, api.AuditQuery{})); len(after) != len(before) {
		t.Errorf("%d rows in the audit log, %d before", len(after), len(before))
	}
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(w.s.metrics.refused)
	counted := map[string]float64{}
	for _, m := range must1(reg.Gather())[0].GetMetric() {
		counted[m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue()
	}
	if want := map[string]float64{noToken: 1, "revoked": maxBadTokens + 20}; !maps.Equal(counted, want) {
		t.Errorf("counted %v; want %v", counted, want)
	}
}

// TestEventsOfBadTokensAreFew: strangers behind many addresses are told of together.
func TestEventsOfBadTokensAreFew(t *testing.T) {
	t.Parallel()
	now := time.Now()
	r := &refusals{now: func() time.Time { return now }}
	if text := r.lockedOut(true, "a"); !strings.Contains(text, "by a (") {
		t.Errorf("the first: %q", text)
	}
	for i := range tellMost + 3 {
		if text := r.lockedOut(true, fmt.Sprint("b", i)); text != "" {
			t.Errorf("soon after: %q", text)
		}
	}
	now = now.Add(tellTokens)
	if text := r.lockedOut(false, "c"); !strings.Contains(text, "by b3; b4; b5; b6; b7; and by 3 others") {
		t.Errorf("together: %q", text)
	}
	now = now.Add(tellTokens)
	if text := r.lockedOut(false, "c"); text != "" {
		t.Errorf("nobody new: %q", text)
	}
}
