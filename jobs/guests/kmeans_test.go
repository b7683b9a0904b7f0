//go:build linux

package guests

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/jobs/internal/wasmtest"
)

// nativeKmeans builds the guest's own source for this machine.
func nativeKmeans(t testing.TB, flags ...string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "kmeans")
	cmd := exec.Command(testenv.Tool(t, "gcc", "gcc libc6-dev"), append(flags, "-std=c11", "-O2", "-ffp-contract=off",
		"-I", filepath.Join(wasmtest.Guests(), "include"), "-o", out, filepath.Join(wasmtest.Guests(), "kmeans", "main.c"))...)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return out
}

func runNative(t testing.TB, program string, in []byte, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Stdin = bytes.NewReader(in)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v", program, args, err)
	}
	return out
}

// clouds are n points around some centres, so that there is something to find.
func clouds(r *rand.Rand, n, dimensions int) [][]float32 {
	centres := make([][]float64, 1+r.IntN(9))
	for i := range centres {
		for range dimensions {
			centres[i] = append(centres[i], 20*r.NormFloat64())
		}
	}
	points := make([][]float32, n)
	for i := range points {
		for _, x := range centres[r.IntN(len(centres))] {
			points[i] = append(points[i], float32(x+r.NormFloat64()))
		}
		if i > 0 && r.IntN(20) == 0 {
			points[i] = points[r.IntN(i)] // the same point again
		}
	}
	return points
}

func asCSV(points [][]float32, ending string) []byte {
	var out []byte
	for _, p := range points {
		for d, x := range p {
			if d > 0 {
				out = append(out, ',')
			}
			out = strconv.AppendFloat(out, float64(x), 'g', -1, 32)
		}
		out = append(out, ending...)
	}
	return out
}

func asFloats(points [][]float32) (out []byte) {
	for _, p := range points {
		for _, x := range p {
			out = binary.LittleEndian.AppendUint32(out, math.Float32bits(x))
		}
	}
	return out
}

type clusters struct {
	K, Points, Dimensions, Iterations int
	Converged                         bool
	Inertia                           float64
	Clusters                          []cluster
}

type cluster struct {
	Count    int
	Centroid []float32
}

// TestKmeansAgreesWithNativeBuildsAndWithGo runs the module, the same source built for
// this machine with vectors and without, and the plain algorithm in Go: the bytes
// are the same, and the values are Go's.
func TestKmeansAgreesWithNativeBuildsAndWithGo(t *testing.T) {
	needsClang(t)
	vectors, scalar := nativeKmeans(t), nativeKmeans(t, "-DKMEANS_SCALAR")
	r := rand.New(rand.NewPCG(testenv.Seed(t), 2))
	for range 25 {
		n, dimensions := 1+r.IntN(3000), 1+r.IntN(12)
		points := clouds(r, n, dimensions)
		k := min(1+r.IntN(13), len(distinct(points)))
		seed, iterations := r.Uint64()>>1, 1+r.IntN(40)
		args := []string{"-k", strconv.Itoa(k), "-seed", strconv.FormatUint(seed, 10), "-iterations", strconv.Itoa(iterations)}
		what := fmt.Sprintf("%d points of %d dimensions, %q", n, dimensions, args)

		ending := []string{"\n", "\r\n"}[r.IntN(2)]
		in := asCSV(points, ending)
		if r.IntN(2) == 0 {
			in = bytes.TrimSuffix(in, []byte(ending))
		}
		got := run(t, "kmeans", in, args...)
		for _, program := range []string{vectors, scalar} {
			if native := runNative(t, program, in, args...); !bytes.Equal(got, native) {
				t.Errorf("%s: the module says\n%.300s\na native build says\n%.300s", what, got, native)
			}
		}
		raw := append(slices.Clone(args), "-f32", strconv.Itoa(dimensions))
		if same := run(t, "kmeans", asFloats(points), raw...); !bytes.Equal(got, same) {
			t.Errorf("%s: of CSV\n%.300s\nof float32\n%.300s", what, got, same)
		}
		if same := run(t, "kmeans", append([]byte("a,\"b\n"), in...), append(slices.Clone(args), "-header")...); !bytes.Equal(got, same) {
			t.Errorf("%s: without a header\n%.300s\nwith one\n%.300s", what, got, same)
		}

		var c clusters
		if err := json.Unmarshal(got, &c); err != nil {
			t.Fatal(err)
		}
		if want := goKmeans(points, k, seed, iterations); fmt.Sprint(c) != fmt.Sprint(want) {
			t.Errorf("%s: the module says\n%.500v\nGo says\n%.500v", what, c, want)
		}
	}
}

func distinct(points [][]float32) map[string]bool {
	all := map[string]bool{}
	for _, p := range points {
		all[fmt.Sprint(p)] = true
	}
	return all
}

// goKmeans is the algorithm as a textbook has it, of what main.c says about seeds, ties
// and clusters without points. The conversions keep the compiler from fusing.
func goKmeans(points [][]float32, k int, seed uint64, iterations int) clusters {
	random := func() float64 {
		seed += 0x9e3779b97f4a7c15
		z := seed
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		return float64((z^z>>31)>>11) / (1 << 53)
	}
	square := func(a, b []float32) (sum float32) {
		for d := range a {
			away := a[d] - b[d]
			sum += float32(away * away)
		}
		return sum
	}
	closest := func(p []float32, centroids [][]float32) (index int, least float32) {
		least = float32(math.Inf(1))
		for i, c := range centroids {
			if s := square(p, c); s < least {
				index, least = i, s
			}
		}
		return index, least
	}

	centroids := [][]float32{slices.Clone(points[int(random()*float64(len(points)))])}
	for len(centroids) < k {
		var total float64
		squares := make([]float64, len(points))
		for i, p := range points {
			_, s := closest(p, centroids)
			squares[i] = float64(s)
			total += squares[i]
		}
		target, below, chosen := random()*total, 0.0, 0
		for i, s := range squares {
			if s > 0 && below <= target {
				chosen = i
			}
			below += s
		}
		centroids = append(centroids, slices.Clone(points[chosen]))
	}

	result := clusters{K: k, Points: len(points), Dimensions: len(points[0])}
	for !result.Converged && result.Iterations < iterations {
		result.Iterations++
		sums, counts, squares := make([][]float64, k), make([]int, k), make([]float32, len(points))
		for i, p := range points {
			var c int
			c, squares[i] = closest(p, centroids)
			if sums[c] == nil {
				sums[c] = make([]float64, len(p))
			}
			for d, x := range p {
				sums[c][d] += float64(x)
			}
			counts[c]++
		}
		result.Converged = true
		for c := range centroids {
			moved := make([]float32, len(points[0]))
			if counts[c] == 0 {
				far := 0
				for i, s := range squares {
					if s > squares[far] {
						far = i
					}
				}
				copy(moved, points[far])
				squares[far] = 0
			} else {
				for d, s := range sums[c] {
					moved[d] = float32(s / float64(counts[c]))
				}
			}
			if !slices.Equal(moved, centroids[c]) {
				result.Converged = false
			}
			centroids[c] = moved
		}
	}
	result.Clusters = make([]cluster, k)
	for _, p := range points {
		c, s := closest(p, centroids)
		result.Clusters[c].Count++
		result.Inertia += float64(s)
	}
	for i, c := range centroids {
		result.Clusters[i].Centroid = c
	}
	return result
}

func TestKmeansFindsWhatIsThere(t *testing.T) {
	needsClang(t)
	var points [][]float32
	for i := range 3000 {
		points = append(points, []float32{float32(i%3) * 100, float32(i%7) / 10})
	}
	var c clusters
	if err := json.Unmarshal(run(t, "kmeans", asCSV(points, "\n"), "-k", "3", "-seed", "1"), &c); err != nil {
		t.Fatal(err)
	}
	if !c.Converged {
		t.Error("it has not converged")
	}
	var at []int
	for _, cluster := range c.Clusters {
		if cluster.Count != 1000 {
			t.Errorf("a cluster has %d points, not 1000", cluster.Count)
		}
		at = append(at, int(math.Round(float64(cluster.Centroid[0]))))
	}
	slices.Sort(at)
	if !slices.Equal(at, []int{0, 100, 200}) {
		t.Errorf("the clusters are at %v", at)
	}
}

func TestKmeansRefusesWhatItCannotDo(t *testing.T) {
	needsClang(t)
	no := func(says, in string, args ...string) { t.Helper(); refuses(t, says, "kmeans", []byte(in), args...) }
	no("how many clusters", "1\n")
	no("there are 0 points", "", "-k", "1")
	no("there are 0 points", "a,b", "-k", "1", "-header")
	no("there are 2 points, fewer than the 3 clusters", "1\n2\n", "-k", "3")
	no("only 2 different points", "1\n2\n1\n2\n", "-k", "3")
	no("line 2 has 1 fields, the first has 2", "1,2\n3\n", "-k", "1")
	no("line 2 has 2 fields, the first has 1", "1\n3,4", "-k", "1")
	no(`line 2, field 1: "" is no number`, "1\n\n2\n", "-k", "1")
	no(`line 1, field 2: "" is no number`, "1,", "-k", "1")
	no(`line 1, field 2: "0x1p3" is no number`, "1,0x1p3\n", "-k", "1")
	no(`line 1, field 1: "nan" is no number`, "nan\n", "-k", "1")
	no(`line 1, field 1: "-inf" is no number`, "-inf\n", "-k", "1")
	no(`line 1, field 1: " 1" is no number`, " 1\n", "-k", "1")
	no(`line 1, field 1: "1e" is no number`, "1e\n", "-k", "1")
	no("line 3, field 1: 1e16 is beyond 1e15", "1\n2\n1e16\n", "-k", "1")
	no("line 1, field 1: 1e999 is beyond 1e15", "1e999\n", "-k", "1")
	no("is no number", "\x00\x01\x02", "-k", "1")
	no("is no number", strings.Repeat("1", 3<<20), "-k", "1")
	no("line 1 has more than 4096 fields", strings.Repeat("1,", 5000), "-k", "1")
	no("in the middle of point 2", string(make([]byte, 11)), "-k", "1", "-f32", "2")
	no("in the middle of point 1", "\x00", "-k", "1", "-f32", "1")
	no("point 1, value 2 is no number", "\x00\x00\x00\x00\x00\x00\xc0\x7f", "-k", "1", "-f32", "2") // a NaN
	no("point 2, value 1 is no number", "\x00\x00\x00\x00\x00\x00\x80\xff", "-k", "1", "-f32", "1") // -infinity
	no("no number between 1 and 65535", "1\n", "-k", "0")
	no("no number between 1 and 65535", "1\n", "-k", "99999999999999999999999")
	no("no number between 0 and", "1\n", "-k", "1", "-seed", "-1")
	no("there is no flag \"-x\"", "1\n", "-x", "1")
	no("is no flag, or has no value", "1\n", "-k")
	no("no name of an input", "1\n", "-k", "1", "-in", "../etc/passwd")
	no("cannot open /in/missing", "1\n", "-k", "1", "-in", "missing")
	no("cannot open /out/missing", "1\n", "-k", "1", "-out", "missing")
	no("-header is for CSV", "1\n", "-k", "1", "-f32", "1", "-header")
}
