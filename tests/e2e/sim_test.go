package e2e

import (
	"fmt"
	"strconv"
	"testing"

	"sallyport/tests/harness"
)

// TestSimulatedPlant: 200 nodes enrol through an RCP, take a change, and lose
// and double no event while channels are cut, nodes are slow and their
// processes are killed. They come back with the identities that they have.
func TestSimulatedPlant(t *testing.T) {
	harness.Long(t)
	const nodes = 200
	site := harness.New(t)
	gateway := site.Gateway()
	relay := site.RCP(gateway, "dmz-1")
	code := gateway.Run("join", "create", "--uses", strconv.Itoa(nodes)).Exits(0).Stdout
	data := site.Path("sim")

	type report struct {
		Connected int `json:"connected"`
		Enrolled  int `json:"enrolled"`
		Processes int `json:"processes"`
		Running   int `json:"running"`
		Fanout    []struct {
			Acked float64 `json:"acknowledged_seconds"`
		} `json:"fanout"`
		RCP struct {
			SocketsEach float64 `json:"sockets_per_node"`
		} `json:"rcp"`
		Events struct {
			Stored   int64 `json:"stored"`
			Verified bool  `json:"verified"`
			Lost     int64 `json:"lost"`
			Doubled  int64 `json:"doubled"`
		} `json:"events"`
		Chaos struct {
			Cuts int `json:"cuts"`
		} `json:"chaos"`
	}
	sim := func(flags ...string) (r report) {
		t.Helper()
		args := append([]string{"sim", "-o", "json", "--nodes", strconv.Itoa(nodes), "--data", data, "--timeout", "3m"}, flags...)
		gateway.Run(args...).Exits(0).JSON(&r)
		if r.Connected != nodes || r.Running != nodes {
			t.Errorf("%d nodes are connected, %d running; want %d", r.Connected, r.Running, nodes)
		}
		return r
	}

	first := sim("--join", site.File("sim.join", code), "--per-process", "100", "--fanout", "2", "--duration", "1s",
		"--rcp-pid", fmt.Sprint(relay.PID()))
	if first.Enrolled != nodes || first.Processes != 2 {
		t.Errorf("%d nodes enrolled in %d processes", first.Enrolled, first.Processes)
	}
	if len(first.Fanout) != 2 || first.Fanout[1].Acked <= 0 {
		t.Errorf("changes to all: %+v", first.Fanout)
	}
	if s := first.RCP.SocketsEach; s < 0.9 || s > 1.1 {
		t.Errorf("a node costs the RCP %.2f sockets, want one", s)
	}

	second := sim("--events-per-second", "500", "--chaos", "seed=7", "--duration", "35s")
	if second.Enrolled != 0 {
		t.Errorf("%d nodes enrolled again", second.Enrolled)
	}
	if e := second.Events; !e.Verified || e.Stored < 1000 || e.Lost+e.Doubled != 0 {
		t.Errorf("events under chaos: %+v", e)
	}
	if second.Chaos.Cuts == 0 {
		t.Error("chaos cut no channel")
	}
}
