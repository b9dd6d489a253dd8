"""The 22 domains of the virtual tool bank, as data in two languages."""

from __future__ import annotations

from dataclasses import dataclass

GENERAL = "general_information_search"


@dataclass(frozen=True)
class Domain:
    """What one canonical tool knows. `stems` begin the names of its variants; `noun` and `examples` stand in the
    descriptions; `keywords` tell a passage of this domain; `fields` are optional parameters, name: (English, Chinese).
    """

    name: str
    stems: tuple[str, ...]
    noun: dict[str, str]
    examples: dict[str, str]
    keywords: tuple[str, ...]
    fields: dict[str, tuple[str, str]]


_ROWS = """
person_information_search
stems: person people biography figure
noun: people and their lives / 人物及其生平
examples: birth, family, career, awards / 出生、家庭、职业、奖项
keywords: born died actor actress singer writer author director politician player artist musician son daughter wife
keywords: husband he she his her career 出生 演员 歌手 作家
field person_name: full name of the person / 人物全名
field occupation: profession or role / 职业或身份
field birth_period: years or century of birth / 出生年代

creation_information_search
stems: creation works media artwork
noun: films, books, music and other works / 电影、书籍、音乐等作品
examples: author, cast, release, plot / 作者、演员、发行、情节
keywords: film movie album song novel book band series episode television directed released starring written comic
keywords: game opera painting magazine soundtrack 电影 小说 专辑 歌曲
field work_title: title of the work / 作品名称
field work_type: film, album, novel and so on / 作品类型
field creator: who made it / 创作者

historical_event_search
stems: history event historical chronicle
noun: historical events / 历史事件
examples: course, causes, participants, dates / 经过、原因、参与者、日期
keywords: war battle revolution treaty empire dynasty century siege uprising massacre rebellion history historical
keywords: ancient 战争 革命 朝代
field event_name: name of the event / 事件名称
field era: period or year / 时期或年份
field participants: sides or people involved / 参与方

geographic_information_search
stems: geography place location atlas
noun: places and regions / 地点与地区
examples: location, borders, population, climate / 位置、边界、人口、气候
keywords: city town village county river mountain island located north south east west population region province
keywords: capital lake district 城市 河流 位于 省
field place_name: name of the place / 地名
field country: country it lies in / 所属国家
field feature_type: city, river, mountain and so on / 地理类型

scientific_information_search
stems: science scientific research discovery
noun: science and technology / 科学与技术
examples: principles, discoveries, properties / 原理、发现、性质
keywords: species genus physics chemistry computer software planet star theory mathematics technology plant animal
keywords: chemical engine spacecraft 物种 物理 化学
field subject: scientific subject / 科学主题
field discipline: branch of science / 学科
field property_of_interest: what is asked about it / 关注的性质

academic_information_search
stems: academic scholarly university literature
noun: universities, scholars and publications / 高校、学者与出版物
examples: studies, degrees, journals / 研究、学位、期刊
keywords: university college professor school institute journal research faculty academic campus student thesis 大学
keywords: 教授 学院
field institution: university or institute / 院校或机构
field scholar: name of a scholar / 学者姓名
field field_of_study: field / 研究领域

legal_information_search
stems: legal law statute judicial
noun: laws, courts and cases / 法律、法院与案例
examples: statutes, rulings, parties / 法条、判决、当事人
keywords: law court act judge supreme legal case statute justice constitution amendment trial convicted lawyer 法律
keywords: 法院
field jurisdiction: country or court / 司法辖区
field case_name: name of the case or statute / 案件或法规名称
field legal_topic: area of law / 法律领域

economic_information_search
stems: economy business company finance
noun: companies, markets and the economy / 公司、市场与经济
examples: founding, products, revenue, owners / 成立、产品、收入、股东
keywords: company corporation founded bank market business brand industry manufacturer headquartered owned economy
keywords: trade store chain publisher 公司 银行 市场
field organisation: company or organisation / 公司或组织
field sector: branch of industry / 行业
field fiscal_period: year or quarter / 财务时期

medical_information_search
stems: medical health disease clinical
noun: health and medicine / 健康与医学
examples: symptoms, treatment, anatomy / 症状、治疗、解剖
keywords: disease medical hospital health drug cancer treatment syndrome patient medicine physician surgery virus
keywords: 疾病 医院
field condition: disease or condition / 疾病或状况
field treatment: drug or procedure / 药物或疗法
field body_part: organ or body part / 器官或部位

tradition_cultural_information_search
stems: culture tradition heritage folklore
noun: traditions, festivals and languages / 传统、节日与语言
examples: customs, origins, meaning / 习俗、起源、含义
keywords: festival tradition culture folk language cuisine dish dance holiday heritage custom museum mythology 节日
keywords: 传统 文化
field tradition_name: name of the tradition / 传统名称
field community: people or region / 民族或地区
field season_or_date: when it takes place / 时间

environmental_information_search
stems: environment nature climate ecology
noun: nature and the environment / 自然与环境
examples: habitats, weather, protection / 栖息地、天气、保护
keywords: climate forest conservation pollution habitat park ecosystem weather monsoon endangered reserve
keywords: temperature 气候 森林
field habitat: habitat or ecosystem / 栖息地或生态系统
field phenomenon: natural phenomenon / 自然现象
field region: region concerned / 相关地区

sports_information_search
stems: sports athletics match tournament
noun: sports / 体育
examples: teams, results, records / 球队、成绩、纪录
keywords: football league team cup season championship club coach stadium olympic basketball baseball tennis
keywords: cricket rugby tournament 足球 联赛 奥运
field team_or_athlete: team or athlete / 球队或运动员
field competition: competition or league / 赛事或联赛
field season: season or year / 赛季或年份

transportation_information_search
stems: transport transit railway aviation
noun: transport / 交通
examples: routes, stations, vehicles / 路线、车站、车辆
keywords: railway station airport highway road train airline aircraft bus ship bridge route locomotive flight
keywords: motorway 铁路 机场 车站
field route: line or route / 线路
field vehicle: vehicle or model / 车辆或型号
field operator: who runs it / 运营方

lifestyle_service_search
stems: lifestyle service daily leisure
noun: everyday life and services / 日常生活与服务
examples: food, shops, hotels / 餐饮、商店、酒店
keywords: restaurant hotel shopping mall food recipe fashion clothing travel tourism cosmetics beer
keywords: coffee 餐厅 酒店 购物
field service_type: kind of service / 服务类型
field area: neighbourhood or city / 区域
field preference: wish of the user / 偏好

education_information_search
stems: education schooling curriculum training
noun: schools and teaching / 学校与教学
examples: courses, degrees, admission / 课程、学位、招生
keywords: education teacher curriculum examination elementary kindergarten pupils grammar academy scholarship 教育 课程
field school_name: school / 学校
field level: level of education / 教育阶段
field course: course or subject / 课程

military_information_search
stems: military defence armed weapons
noun: armed forces and weapons / 军队与武器
examples: units, equipment, operations / 部队、装备、行动
keywords: army navy force military regiment weapon squadron soldier missile tank general brigade commander infantry
keywords: 军队 武器
field unit: unit or force / 部队
field equipment: weapon or equipment / 武器装备
field operation: operation or campaign / 军事行动

religious_information_search
stems: religion faith theology sacred
noun: religions / 宗教
examples: beliefs, texts, places of worship / 信仰、经典、宗教场所
keywords: church god bishop religion temple saint catholic christian islamic buddhist pope bible monastery priest
keywords: 宗教 教堂 寺
field religion: religion or denomination / 宗教或教派
field scripture: text or passage / 经典
field figure: religious figure / 宗教人物

politics_information_search
stems: politics government policy election
noun: politics and government / 政治与政府
examples: offices, parties, elections / 职务、政党、选举
keywords: president minister party election parliament government senate governor mayor democratic republican
keywords: political congress king queen 总统 政府 选举
field office: office or institution / 职务或机构
field party: party or coalition / 政党
field term: term or election / 任期或选举

meituan_search-meituan_search
stems: platform merchant listing deals
noun: merchants and offers of a local platform / 本地平台的商户与优惠
examples: shops, prices, delivery / 商家、价格、配送
keywords: delivery takeaway voucher merchant coupon 外卖 团购 商家
field merchant: merchant or brand / 商户或品牌
field category: category of the offer / 优惠类别
field budget: price range / 价格范围

meituan_search-poi_detail
stems: poi venue shopdetail spot
noun: details of a place nearby / 附近地点的详情
examples: address, hours, ratings / 地址、营业时间、评分
keywords: address opening hours rating nearby 地址 营业
field poi_name: name of the place / 地点名称
field city: city / 城市
field detail: what is asked about it / 查询的内容

meituan_search-web_search
stems: web online internet page
noun: pages of the open web / 互联网网页
examples: news, guides, opinions / 新闻、攻略、评论
keywords: website online internet blog review 网站 网页
field site: site to look at / 网站
field freshness: how recent / 时效
field page_language: language of the page / 网页语言

general_information_search
stems: general universal encyclopedia knowledge
noun: any subject / 任意主题
examples: facts of every kind / 各类事实
field topic: subject area / 主题领域
field detail_level: how much detail / 详细程度
field source_type: kind of source / 来源类型
"""


def _domain(block: str) -> Domain:
    name, *lines = block.strip().splitlines()
    both: dict[str, dict[str, str]] = {}
    fields: dict[str, tuple[str, str]] = {}
    words: list[str] = []
    stems: tuple[str, ...] = ()
    for line in lines:
        key, _, value = line.partition(": ")
        if key == "stems":
            stems = tuple(value.split())
        elif key == "keywords":
            words += value.split()
        else:
            english, _, chinese = value.partition(" / ")
            if key.startswith("field "):
                fields[key.removeprefix("field ")] = (english, chinese)
            else:
                both[key] = {"en": english, "zh": chinese}
    return Domain(name, stems, both["noun"], both["examples"], tuple(words), fields)


DOMAINS: dict[str, Domain] = {domain.name: domain for domain in map(_domain, _ROWS.strip().split("\n\n"))}
