//go:build linux

package guests

import (
	"bytes"
	"encoding/csv"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/internal/testenv"
)

var cities = []string{"Köln", "Bonn", "Bad \"Ems\"", "Frankfurt, Oder", "two\nlines", " Aach ", "ÅÄ"}

// sales is a table with prices to the cent, counts that are now and then missing, and
// texts that have to be quoted.
func sales(t *testing.T, rows int) []byte {
	t.Helper()
	r := rand.New(rand.NewPCG(testenv.Seed(t), 5))
	var b bytes.Buffer
	w := csv.NewWriter(&b)
	_ = w.Write([]string{"id", "city", "price", "n"}) // a buffer takes everything
	for i := range rows {
		n := ""
		if r.IntN(10) > 0 {
			n = strconv.FormatInt(r.Int64N(1<<50)-1<<40, 10)
		}
		cents := r.IntN(2_000_000) - 500_000
		price := fmt.Sprintf("%d.%02d", cents/100, max(cents, -cents)%100)
		if cents < 0 && cents > -100 {
			price = "-" + price
		}
		_ = w.Write([]string{strconv.Itoa(i), cities[r.IntN(len(cities))], price, n})
	}
	w.Flush()
	return b.Bytes()
}

// sqlite answers queries over the table t of a file of CSV.
func sqlite(t *testing.T, table []byte, query string) [][]string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "table.csv")
	if err := os.WriteFile(path, table, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(testenv.Tool(t, "sqlite3", "sqlite3"), "-csv", ":memory:", ".import --csv "+path+" t", "update t set n = null where n = ''", query)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return records(t, out)
}

func records(t *testing.T, table []byte) [][]string {
	t.Helper()
	all, err := csv.NewReader(bytes.NewReader(table)).ReadAll()
	if err != nil {
		t.Fatalf("%v in\n%.500s", err, table)
	}
	return all
}

func TestTabulateChoosesTheRowsThatSqliteDoes(t *testing.T) {
	table := sales(t, 2000)
	for where, sql := range map[string]string{
		`price >= 1234.5`:            `price + 0 >= 1234.5`,
		`n != null && price < -0.99`: `n is not null and price + 0 < -0.99`,
		`city == "Bad \"Ems\"" || city == "two\nlines" && n == null`: `city = 'Bad "Ems"' or city = 'two' || char(10) || 'lines' and n is null`,
		`!(city < "Köln" || city ~ "a")`:                             `not (city < 'Köln' or instr(city, 'a'))`,
		"`n` > 1e14 && !(price > 1000) && id != 7":                   `n + 0 > 100000000000000 and not (price + 0 > 1000) and id + 0 != 7`,
		`-5 < price && price <= 5.00`:                                `-5 < price + 0 and price + 0 <= 5`,
		`id > 5 && id < 3`:                                           `0`,
	} {
		want := sqlite(t, table, "select price, city, n from t where "+sql)
		got := records(t, run(t, "tabulate", table, "-where", where, "-select", "price,city,n"))
		if !slices.Equal(got[0], []string{"price", "city", "n"}) {
			t.Errorf("%s: the header is %q", where, got[0])
		}
		if !equal(got[1:], want) {
			t.Errorf("%s: %d rows, sqlite has %d\n%.300q\n%.300q", where, len(got)-1, len(want), got[1:], want)
		}
	}
	if got := records(t, run(t, "tabulate", table)); !equal(got, records(t, table)) {
		t.Error("without a condition the table is not what it was")
	}
}

func equal(a, b [][]string) bool { return slices.EqualFunc(a, b, slices.Equal[[]string]) }

func TestTabulateAddsUpWhatSqliteDoes(t *testing.T) {
	table := sales(t, 5000)
	got := records(t, run(t, "tabulate", table, "-where", "price > -100", "-by", "city",
		"-agg", "count,count(n),sum(n),min(n),max(n),sum(price),min(price),max(price),mean(price)"))[1:]
	want := sqlite(t, table, `select city, count(*), count(n), sum(cast(n as integer)), min(cast(n as integer)), max(cast(n as integer)),
		decimal_sum(price), min(cast(price as real)), max(cast(price as real)), avg(cast(price as real))
		from t where price + 0 > -100 group by city order by city`)
	if len(got) != len(want) || len(got) != len(cities) {
		t.Fatalf("%d groups, sqlite has %d", len(got), len(want))
	}
	for i := range got {
		if !slices.Equal(got[i][:6], want[i][:6]) {
			t.Errorf("got  %q\nwant %q", got[i], want[i])
		}
		if sum := strings.TrimSuffix(strings.TrimRight(want[i][6], "0"), "."); got[i][6] != sum {
			t.Errorf("%s: the sum is %s, sqlite says %s", got[i][0], got[i][6], sum)
		}
		for c := 7; c < 10; c++ {
			ours, _ := strconv.ParseFloat(got[i][c], 64)
			theirs, _ := strconv.ParseFloat(want[i][c], 64)
			if math.Abs(ours-theirs) > 1e-6 {
				t.Errorf("%s: column %d is %s, sqlite says %s", got[i][0], c, got[i][c], want[i][c])
			}
		}
	}
}

// TestTabulateFiltersJSONAsJqDoes gives both the same lines.
func TestTabulateFiltersJSONAsJqDoes(t *testing.T) {
	r := rand.New(rand.NewPCG(testenv.Seed(t), 6))
	var lines bytes.Buffer
	for i := range 2000 {
		name := "null"
		if r.IntN(5) > 0 {
			name = strconv.Quote(cities[r.IntN(len(cities))])
		}
		fmt.Fprintf(&lines, `{"id":%d, "at":{"city":%s,"zip":[1, 2]}, "ok":%v, "n":%d}`+"\n", i, name, r.IntN(2) == 0, r.IntN(100)-50)
	}
	for where, filter := range map[string]string{
		`ok == true && n > 10`:                      `select(.ok and .n > 10)`,
		`at.city == "Köln" || ok != true && n == 3`: `select(.at.city == "Köln" or (.ok | not) and .n == 3)`,
		`at.city == null && n >= -20`:               `select(.at.city == null and .n >= -20)`,
		`at.city != "Köln" && missing != 5`:         `select(.at.city != "Köln")`,
		`at.city ~ "n" && missing == null`:          `select(.at.city // "" | contains("n"))`,
	} {
		want := jq(t, lines.Bytes(), filter+`| {id, at, "at.city": .at.city, missing}`)
		if got := string(run(t, "tabulate", lines.Bytes(), "-format", "json", "-where", where, "-select", "id,at,at.city,missing")); got != want {
			t.Errorf("%s: got\n%.500s\njq says\n%.500s", where, got, want)
		}
		if got := jq(t, run(t, "tabulate", lines.Bytes(), "-format", "json", "-where", where), "."); got != jq(t, lines.Bytes(), filter) {
			t.Errorf("%s: whole lines are not those of jq", where)
		}
	}
	want := jq(t, lines.Bytes(), `-s`, `group_by(.ok) | .[] | {ok: .[0].ok, "count(at.city)": map(select(.at.city)) | length, "sum(n)": map(.n) | add, "max(id)": map(.id) | max}`)
	if got := string(run(t, "tabulate", lines.Bytes(), "-format", "json", "-by", "ok", "-agg", "count(at.city),sum(n),max(id)")); got != want {
		t.Errorf("got\n%s\njq says\n%s", got, want)
	}
}

func jq(t *testing.T, in []byte, args ...string) string {
	t.Helper()
	cmd := exec.Command(testenv.Tool(t, "jq", "jq"), append([]string{"-c"}, args...)...)
	cmd.Stdin = bytes.NewReader(in)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestTabulateIsExact(t *testing.T) {
	for in, want := range map[string]string{
		"x\n0.1\n0.2\n": "0.3,0.15\n",
		"x\n9007199254740993\n9007199254740993\n-1\n": "18014398509481985,6004799503160661.666667\n",
		"x\n1e30\n1\n-1e30\n":                         "1,0.333333\n",
		"x\n1e-30\n1\n":                               "1." + strings.Repeat("0", 29) + "1,0.5\n",
		"x\n+007.50\n-7.5\n":                          "0,0\n",
		"x\n-0\n":                                     "0,0\n",
		"x\n0.000001\n0\n":                            "0.000001,0.000001\n", // half of the last digit, away from zero
		"x\n-0.000001\n0\n":                           "-0.000001,-0.000001\n",
		"x\n-0.0000001\n":                             "-0.0000001,0\n",
		"x\n" + strings.Repeat("9", 1000) + "\n1\n0\n0\n0\n0\n0\n": "1" + strings.Repeat("0", 1000) + ",",
		"x,y\n,1\n,2\n": ",\n",
	} {
		got, ok := strings.CutPrefix(string(run(t, "tabulate", []byte(in), "-agg", "sum(x),mean(x)")), "sum(x),mean(x)\n")
		if !ok || !strings.HasPrefix(got, want) {
			t.Errorf("of %.60q: %.1100q, want %.1100q", in, got, want)
		}
	}
}

func TestTabulateRefusesWhatItCannotDo(t *testing.T) {
	no := func(says, in string, args ...string) { t.Helper(); refuses(t, says, "tabulate", []byte(in), args...) }
	no("the input is empty", "")
	no("field 2 has no name", "a,,c\n")
	no("field 2 has no name, or that of another", "a,a\n")
	no("line 3 has more or fewer fields than the first", "a,b\n1,2\n3\n")
	no("line 3 is no CSV", "a,b\n\"1,2\n3,4\n")
	no("line 2 is no CSV", "a,b\n1\"x,2\n")
	no(`there is no field "c"; there are: a, b`, "a,b\n1,2\n", "-select", "a,c")
	no(`there is no field "c"`, "a,b\n1,2\n", "-where", "a > 1 && (b < 1 || c == 2)")
	no(`line 3: field "a" is "x", which is no number`, "a\n1\nx\n", "-where", "a > 0")
	no(`line 3: field "a" is "1e", which is no number`, "a\n1\n1e\n", "-agg", "sum(a)")
	no("+-1", "a\n+-1\n", "-agg", "sum(a)")
	no("beyond the numbers", "a\n1e1000000000\n", "-agg", "sum(a)")
	no("beyond the numbers", "a\n1e-5000\n", "-agg", "min(a)")
	no("beyond the numbers", "a\n1e99999999999999999999999\n", "-where", "a > 1")
	no("longer than the 1000 characters", "a\n"+strings.Repeat("1", 1001)+"\n", "-agg", "sum(a)")
	no("line 2 is no JSON object", "{\"a\":1}\n[1]\n", "-format", "json")
	no("line 1 is no JSON object", "null\n", "-format", "json")
	no("line 1 is no JSON object", "{\"a\":1", "-format", "json")
	no("line 1 is no UTF-8", "{\"a\":\"\xff\"}\n", "-format", "json")
	no("line 1 is no JSON object", "\x00\x01\x02", "-format", "json")
	no(`field "a" is a text (5), no number`, "{\"a\":\"5\"}\n", "-format", "json", "-agg", "sum(a)")
	no("they cannot be compared", "{\"a\":true}\n", "-format", "json", "-where", `a == "true"`)
	no("looks for a text in a text", "{\"a\":5}\n", "-format", "json", "-where", `a ~ "5"`)
	no("by == and != only", "a\n1\n", "-where", "a < null")
	no("is missing before", "a\n1\n", "-where", "a")
	no("is left over", "a\n1\n", "-where", "a > 1 a")
	no("it ends where a field", "a\n1\n", "-where", "a >")
	no("closing parenthesis", "a\n1\n", "-where", "(a > 1")
	no("more than 100 parentheses", "a\n1\n", "-where", strings.Repeat("(", 5000)+"a > 1")
	no("has no end", "a\n1\n", "-where", `a == "x`)
	no("is no number", "a\n1\n", "-where", "a > 1x")
	no("the backquote", "a\n1\n", "-select", "`a")
	no("parted by commas", "a\n1\n", "-select", "a,")
	no("is none of count", "a\n1\n", "-agg", "median(a)")
	no("is none of count", "a\n1\n", "-agg", "sum")
	no("closing parenthesis", "a\n1\n", "-agg", "sum(a")
	no("which is missing", "a\n1\n", "-by", "a")
	no("give one of the two", "a\n1\n", "-select", "a", "-agg", "count")
	no("neither csv nor json", "a\n1\n", "-format", "xml")
}
