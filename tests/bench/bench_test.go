package main

import (
	"context"
	"crypto/tls"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParseStat(t *testing.T) {
	const line = "4242 (a) b (c) S 17 4242 4242 0 -1 4194560 1 2 3 4 250 150 30 20 20 0 9 0 1 2 3 4"
	got, err := parseStat([]byte(line))
	if err != nil {
		t.Fatal(err)
	}
	if want := (procStat{parent: 17, cpu: 4 * time.Second, ended: 500 * time.Millisecond}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for _, bad := range []string{"", "1 sh S 1", "1 (sh) S 1 2", strings.Replace(line, "250", "x", 1)} {
		if _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func TestOwnProcess(t *testing.T) {
	pid := os.Getpid()
	for range 1 << 22 { // some work to be counted
		_ = time.Duration(pid).String()
	}
	cpu, err := cpuOf(pid)
	if err != nil || cpu <= 0 {
		t.Errorf("cpu %v, %v", cpu, err)
	}
	m, err := memoryOf(pid)
	if err != nil || m.RSS < 1<<20 || m.Anonymous < 1<<18 || m.Anonymous > m.RSS {
		t.Errorf("memory %+v, %v", m, err)
	}
	before, err := socketsOf(pid)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if after, err := socketsOf(pid); err != nil || after != before+1 {
		t.Errorf("sockets %d, then %d, %v", before, after, err)
	}
}

func TestTreeHoldsChildren(t *testing.T) {
	p, err := startProcess(t.TempDir(), "cat", environment(), "sh", "-c", "cat /dev/zero >/dev/null & wait")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.stop(9) }()
	err = eventually(t.Context(), 5*time.Second, "the child's time counts", func() error {
		all, err := tree(p.pid())
		if err != nil {
			return err
		}
		if len(all) < 2 {
			return errors.New("no child yet")
		}
		cpu, err := cpuOf(p.pid())
		if err == nil && cpu < 30*time.Millisecond {
			err = errors.New("no CPU time")
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	all, err := tree(p.pid())
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range all[1:] { // the shell's child is nobody's after its end
		child, err := os.FindProcess(pid)
		if err == nil {
			_ = child.Kill()
		}
	}
}

func TestParseRollup(t *testing.T) {
	const text = "55d0-7ffd ---p 00000000 00:00 0    [rollup]\nRss:               18692 kB\nPss:               1 kB\nAnonymous:          3800 kB\nAnonHugePages:      2048 kB\nSwap:                100 kB\nSwapPss:            9 kB\n"
	got, err := parseRollup([]byte(text))
	if err != nil || got != (memory{18692 << 10, 3900 << 10}) {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := parseRollup([]byte("Rss: 1 kB\n")); err == nil {
		t.Error("half a file was read")
	}
	if d := got.minus(memory{692 << 10, 900 << 10}).per(3); d != (memory{6000 << 10, 1000 << 10}) {
		t.Errorf("per node %+v", d)
	}
}

func TestStatistics(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 2, 3}, 2}} {
		if got := median(c.in); got != c.want {
			t.Errorf("median of %v is %v", c.in, got)
		}
	}
	hundred := make([]int, 100)
	for i := range hundred {
		hundred[i] = i + 1
	}
	for p, want := range map[float64]int{0.5: 50, 0.99: 99, 1: 100, 0.001: 1} {
		if got := percentile(hundred, p); got != want {
			t.Errorf("percentile %v is %d", p, got)
		}
	}
	if got := percentile([]int(nil), 0.5); got != 0 {
		t.Errorf("percentile of nothing is %d", got)
	}
	if got := spread([]float64{9, 10, 11}); got != 0.2 {
		t.Errorf("spread is %v", got)
	}
	if got := perGiB(3*time.Second, 2*gib); got != 1.5 {
		t.Errorf("per GiB %v", got)
	}
	if got := perOperation(time.Second, 1000); got != 1000 {
		t.Errorf("per operation %v", got)
	}
}

func TestVerdicts(t *testing.T) {
	low := figure{must: 10, stretch: 5}
	high := figure{must: 10, stretch: 20, higher: true}
	none := figure{exact: true}
	for _, c := range []struct {
		f    figure
		v    float64
		want string
	}{
		{low, 11, verdictMissed}, {low, 10, verdictMet}, {low, 5, verdictStretch},
		{high, 9, verdictMissed}, {high, 10, verdictMet}, {high, 20, verdictStretch},
		{none, 0, verdictMet}, {none, 1, verdictMissed}, {figure{must: 1}, 1, verdictMet}, {figure{}, 3, verdictNone},
	} {
		if got := c.f.verdict(c.v); got != c.want {
			t.Errorf("%+v: %v is %q, want %q", c.f, c.v, got, c.want)
		}
	}
	if low.achieved(5) != 2 || high.achieved(20) != 2 || low.achieved(0) != 0 {
		t.Error("a value twice as good is not")
	}
}

func TestFiguresAreWellFormed(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range figures {
		if seen[f.id] {
			t.Errorf("%s stands there twice", f.id)
		}
		seen[f.id] = true
		if !slices.Contains(groups, f.group) || f.row == "" || f.name == "" {
			t.Errorf("%+v is not complete", f)
		}
		if f.stretch != 0 && f.achieved(f.stretch) <= 1 {
			t.Errorf("%s: the stretch is easier than the goal", f.id)
		}
	}
}

func TestDigits(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 1: "1", 0.3: "0.30", 0.0123: "0.0123", 12.345: "12.3", 123.4: "123", 999: "999", 12345.6: "12,346", -1234567: "-1,234,567", 2.5: "2.50"} {
		if got := digits(v); got != want {
			t.Errorf("%v is shown as %s, want %s", v, got, want)
		}
	}
	if got := amount(1234, unitRate); got != "1,234/s" {
		t.Errorf("rate %s", got)
	}
}

func TestSumMetric(t *testing.T) {
	const text = "# HELP a_total x\n# TYPE a_total counter\na_total{direction=\"down\"} 1.5e+09\na_total{direction=\"up\"} 3\na_totally 9\n"
	for label, want := range map[string]float64{"": 1500000003, `direction="up"`: 3} {
		if got, err := sumMetric(text, "a_total", label); err != nil || got != want {
			t.Errorf("%q: got %v, %v", label, got, err)
		}
	}
	for _, bad := range [][2]string{{"b_total", ""}, {"a_total", `direction="sideways"`}} {
		if _, err := sumMetric(text, bad[0], bad[1]); err == nil {
			t.Errorf("%q, which is not there, has a sum", bad)
		}
	}
}

func TestParseFlags(t *testing.T) {
	parse := func(args ...string) (bench, error) {
		var b bench
		var cores int
		err := b.parse(args, &cores)
		return b, err
	}
	b, err := parse("--rows", "bulk,nodes", "--rounds", "2", "--seconds", "0.5", "--scale", "10,90/3")
	if err != nil || !slices.Equal(b.groups, []string{"bulk", "nodes"}) || b.rounds != 2 || b.time != 500*time.Millisecond || !b.write || !slices.Equal(b.points, []scalePlan{{10, 1}, {90, 3}}) {
		t.Errorf("%+v, %v", b.settings, err)
	}
	if b, err := parse("--quick"); err != nil || b.write || b.rounds != 1 || b.nodes != 500 || len(b.groups) != len(groups) {
		t.Errorf("%+v, %v", b.settings, err)
	}
	for _, bad := range [][]string{{"--rows", "speed"}, {"--rounds", "0"}, {"-o", "xml"}, {"--scale", "1/0"}, {"--scale", "many"}, {"bulk"}} {
		if _, err := parse(bad...); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func testResults() results {
	r := results{Machine: machine{CPU: "CPU <1>", Cores: 2, commit: "abc"}, Haproxy: "2.6", Figures: map[string]measured{
		"lane.rcp.1": {Rounds: []float64{0.2, 0.3, 0.4}, Commit: "abc"}, "http.share": {Rounds: []float64{0.4}, Commit: "abd"},
		"http.rate": {Rounds: []float64{20000}, Commit: "abd"}, "events.lost": {Rounds: []float64{0}, Commit: "abd"}}}
	b := bench{results: r}
	b.putScale(scalePoint{Nodes: 1000, RCPs: 1, Reconnect: 1, Anonymous: 20, Desired: -1})
	b.putScale(scalePoint{Nodes: 5000, RCPs: 1, Reconnect: 5, Anonymous: 20, Desired: -1})
	b.putScale(scalePoint{Nodes: 5000, RCPs: 1, Reconnect: 4, Anonymous: 20, Desired: -1})
	return b.results
}

func TestReportKeepsProse(t *testing.T) {
	r := testResults()
	page, err := splice(skeleton+"\n## Why\n\nBecause.\n", r.markdown())
	if err != nil {
		t.Fatal(err)
	}
	again, err := splice(page, r.markdown())
	if err != nil || again != page {
		t.Errorf("a second run changes the page: %v", err)
	}
	for _, want := range []string{
		"## Why\n\nBecause.\n",
		"| Bulk over a lane | RCP CPU, 1 stream | ≤ 0.37 | ≤ 0.30 | 0.30 CPU-s/GiB ± 33 % | ✔✔ | abc |",
		"| Small HTTP requests, 64 connections | requests per second | ≥ 0.55 | ≥ 0.67 | 0.40 of haproxy | ✘ | abd |",
		"| ≤ 12 | not measured |  |  |",
		"| Small HTTP requests, 64 connections | requests | 20,000/s | abd |",
		"| 5,000 | 1 | 0 s | 4 s | 0 KiB / 20 KiB | – | abc |",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("%q is not in\n%s", want, page)
		}
	}
	if strings.Count(page, "| 5,000 |") != 1 {
		t.Error("an older scale point stayed")
	}
	if _, err := splice("# Performance\n", "x"); err == nil {
		t.Error("a page without marks was overwritten")
	}
	if !strings.Contains(r.plain(), "missed") {
		t.Errorf("no verdict in\n%s", r.plain())
	}
}

func TestPlotIsXML(t *testing.T) {
	d := xml.NewDecoder(strings.NewReader(testResults().plot()))
	elements := map[string]int{}
	for {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if e, ok := tok.(xml.StartElement); ok {
			elements[e.Name.Local]++
		}
	}
	if elements["rect"] != 3 || elements["polyline"] != 2 || elements["circle"] != 4 {
		t.Errorf("drawn: %v", elements)
	}
}

func TestResultsOfAnotherMachineGo(t *testing.T) {
	file := filepath.Join(t.TempDir(), "p.json")
	r := testResults()
	r.Figures["gone"] = measured{}
	if err := r.save(file); err != nil {
		t.Fatal(err)
	}
	same := r.Machine
	same.commit = "def"
	got, err := loadResults(file, same)
	if err != nil || len(got.Scale) != 2 || got.Machine.commit != "def" || !slices.Equal(slices.Sorted(maps.Keys(got.Figures)), []string{"events.lost", "http.rate", "http.share", "lane.rcp.1"}) {
		t.Errorf("%+v, %v", got, err)
	}
	other := same
	other.Cores = 64
	if got, err := loadResults(file, other); err != nil || len(got.Figures) != 0 || len(got.Scale) != 0 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestMachine(t *testing.T) {
	const info = "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Intel(R) Xeon(R) Processor\ncpu MHz\t\t: 2300.000\n\nprocessor\t: 1\n"
	if got := cpuModel(info); got != "Intel(R) Xeon(R) Processor (family 6, model 207, 2300 MHz)" {
		t.Error(got)
	}
	if got := cpuModel("model name\t: AMD EPYC 7B12\n"); got != "AMD EPYC 7B12" {
		t.Error(got)
	}
	if got := haproxyVersion("HAProxy version 2.6.12-1+deb12u4 2026/10/17 - https://haproxy.org/\n"); got != "2.6.12-1+deb12u4" {
		t.Error(got)
	}
}

// serving runs a service of the backend on a listener of the test.
func serving(t *testing.T, serve func(net.Listener)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		serve(l)
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return l.Addr().String()
}

func TestLoads(t *testing.T) {
	const d = 50 * time.Millisecond
	ctx := t.Context()
	v, err := bulkDown(ctx, serving(t, tcp(sink)), 3, d)
	if err != nil || v.bytes < bulkBuffer || v.took < d {
		t.Errorf("down: %+v, %v", v, err)
	}
	if v, err := bulkUp(ctx, serving(t, tcp(source)), 3, d); err != nil || v.bytes < bulkBuffer {
		t.Errorf("up: %+v, %v", v, err)
	}
	if l, err := connections(ctx, serving(t, tcp(echo)), 4, d); err != nil || l.count() == 0 || l.p(0.5) <= 0 || l.p(0.5) > l.p(0.99) {
		t.Errorf("connections: %d, %v", l.count(), err)
	}
	web := &http.Server{Handler: http.HandlerFunc(answer)}
	addr := serving(t, func(l net.Listener) { _ = web.Serve(l) })
	if l, err := requests(ctx, addr, 4, d); err != nil || l.count() == 0 || l.perSecond() <= 0 {
		t.Errorf("requests: %d, %v", l.count(), err)
	}
	_ = web.Close()
}

// TestLoadsNoticeLies: a load whose other end loses or changes bytes fails.
func TestLoadsNoticeLies(t *testing.T) {
	ctx := t.Context()
	const d = 10 * time.Millisecond
	wrong := serving(t, tcp(func(c net.Conn) {
		_, _ = io.Copy(io.Discard, c)
		_, _ = c.Write(make([]byte, 8)) // 0 bytes arrived
	}))
	if _, err := bulkDown(ctx, wrong, 1, d); err == nil {
		t.Error("lost bytes were not noticed")
	}
	other := serving(t, tcp(func(c net.Conn) {
		_, _ = io.CopyN(io.Discard, c, connectionSize)
		_, _ = c.Write(make([]byte, connectionSize))
	}))
	if _, err := connections(ctx, other, 1, d); err == nil {
		t.Error("changed bytes were not noticed")
	}
	web := &http.Server{Handler: http.NotFoundHandler()}
	addr := serving(t, func(l net.Listener) { _ = web.Serve(l) })
	if _, err := requests(ctx, addr, 1, d); err == nil {
		t.Error("404 counts as an answer")
	}
	_ = web.Close()
}

func TestHandshakes(t *testing.T) {
	c, err := newChain()
	if err != nil {
		t.Fatal(err)
	}
	size := func(curves []tls.CurveID, resume bool) float64 {
		n, cpu, bytes, took, err := c.shakeFor(context.Background(), 20*time.Millisecond, curves, resume)
		if err != nil || n == 0 || cpu < 0 || took <= 0 {
			t.Fatalf("%d handshakes, %v in %v, %v", n, cpu, took, err)
		}
		return float64(bytes) / float64(n)
	}
	hybrid, classic, resumed := size(nil, false), size([]tls.CurveID{tls.X25519}, false), size(nil, true)
	// The hybrid shares of both sides are 2,272 bytes longer (ML-KEM-768: 1184 and 1088).
	if hybrid-classic < 2000 || resumed == 0 {
		t.Errorf("bytes of a handshake: %.0f hybrid, %.0f classic, %.0f resumed", hybrid, classic, resumed)
	}
}

// socketsOf counts the sockets that a process holds open.
func socketsOf(pid int) (int, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	n := 0
	for _, fd := range fds {
		to, err := os.Readlink(filepath.Join(dir, fd.Name()))
		if err == nil && strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n, nil
}
